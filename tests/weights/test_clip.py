"""CLIP models found and loaded: which towers run them, from which file, and what is left behind."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from capfilt.errors import UsageError
from capfilt.models import convert_clip
from capfilt.models.clip import ClipImageTower
from capfilt.models.packed import PackedLinear
from capfilt.settings import RankSettings
from capfilt.weights.clip import PaddedTexts, Towers, UnpaddedTexts, find_clip, load_clip
from tests import factories

CPU = torch.device("cpu")
TEXTS = torch.tensor([[2, 5, 6, 3] + [0] * 12, [2, 7, 3] + [0] * 13])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    factories.save_clip(tmp_path / "clip")
    return tmp_path / "clip"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_clip(find_clip(RankSettings(clip_model=str(folder))), CPU, dtype)[0]


def is_ours(towers: Towers) -> tuple[bool, bool]:
    """Image tower, text tower."""
    assert isinstance(towers.embed_texts, UnpaddedTexts | PaddedTexts)
    return isinstance(towers.embed_images, ClipImageTower), isinstance(towers.embed_texts, UnpaddedTexts)


@torch.inference_mode()
def embed(towers: Any) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.cat([towers.embed_images(images), towers.embed_texts(TEXTS)]).float()


@torch.inference_mode()
def embed_by_open_clip(folder: Path) -> torch.Tensor:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.cat([model.eval().encode_image(images, normalize=True), model.encode_text(TEXTS, normalize=True)])


def test_openai_models_run_on_our_towers_and_leave_no_plain_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    convert = convert_clip.image_tower_from_open_clip
    monkeypatch.setattr(
        convert_clip,
        "image_tower_from_open_clip",
        lambda model, dtype: models.append(weakref.ref(model)) or convert(model, dtype),
    )
    gc.disable()
    try:
        towers = load(folder)
        assert models[0]() is None, "open_clip's model is still there"
    finally:
        gc.enable()
    assert is_ours(towers) == (True, True)
    assert isinstance(towers.embed_texts._tower.projection, PackedLinear)
    torch.testing.assert_close(embed(towers), embed_by_open_clip(folder), atol=1e-5, rtol=0)


def test_of_several_files_the_one_that_open_clip_takes_is_read(folder: Path) -> None:
    """Hub folders hold the same weights in several formats; of unknown names open_clip chooses."""
    other = {name: tensor + 1 for name, tensor in load_file(folder / "open_clip_model.safetensors").items()}
    torch.save(other, folder / "open_clip_pytorch_model.bin")
    expected = embed_by_open_clip(folder)
    towers = load(folder)
    assert is_ours(towers) == (True, True)
    torch.testing.assert_close(embed(towers), expected, atol=1e-5, rtol=0)
    (folder / "open_clip_model.safetensors").rename(folder / "model.safetensors")
    save_file(other, folder / "another.safetensors")
    towers = load(folder)
    assert is_ours(towers) == (True, True)
    torch.testing.assert_close(embed(towers), embed_by_open_clip(folder), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_half_precision_are_computed_with_as_asked(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "open_clip_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    towers = load(folder, dtype)
    assert towers.embed_images.vision.class_embedding.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(embed(towers), embed_by_open_clip(folder), atol=1e-5, rtol=0)


OTHER_VISION = {"pool_type": "avg"}
OTHER_TEXT = {"pool_type": "last"}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32}


@pytest.mark.parametrize(
    ("vision", "text", "ours"),
    [
        (OTHER_VISION, {}, (False, True)), (RESNET, {}, (False, True)), ({}, OTHER_TEXT, (True, False)),
        (OTHER_VISION, OTHER_TEXT, (False, False)),
    ],
)  # fmt: skip
def test_towers_of_another_build_are_left_to_open_clip(
    folder: Path, vision: dict[str, Any], text: dict[str, Any], ours: tuple[bool, bool]
) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= vision
    config["model_cfg"]["text_cfg"] |= text
    if vision is RESNET:
        model = open_clip.CLIP(**config["model_cfg"])
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            folder / "open_clip_model.safetensors",
        )
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    towers = load(folder)
    assert is_ours(towers) == ours
    torch.testing.assert_close(embed(towers), embed_by_open_clip(folder), atol=1e-5, rtol=0)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_named(folder: Path, damage: str) -> None:
    path = folder / "open_clip_model.safetensors"
    state = load_file(path)
    if damage == "missing":
        del state["visual.proj"]
    elif damage == "unknown":
        state["visual.other"] = torch.zeros(1)
    else:
        state["visual.proj"] = torch.zeros(2, 2)
    save_file(state, path)
    with pytest.raises(UsageError, match="open_clip cannot load .* Give --clip-model and --clip-weights"):
        load(folder)


def test_loading_says_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    code = f"""
import torch
from capfilt.settings import RankSettings
from capfilt.weights.clip import find_clip, load_clip
load_clip(find_clip(RankSettings(clip_model={str(tmp_path / "copy")!r})), torch.device("cpu"), torch.float32)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == done.stderr == ""
