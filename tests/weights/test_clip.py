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
from capfilt.models.clip import ClipImageTower
from capfilt.models.packed import PackedLinear
from capfilt.settings import RankSettings
from capfilt.weights import clip
from capfilt.weights.clip import Towers, UnpaddedTexts, find_clip, load_clip
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
    return isinstance(towers.embed_images, ClipImageTower), isinstance(towers.embed_texts, UnpaddedTexts)


@torch.inference_mode()
def embed(towers: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.cat([towers.embed_images(images), towers.embed_texts(TEXTS)]).float()


@torch.inference_mode()
def embed_by_open_clip(folder: Path) -> torch.Tensor:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.cat([model.eval().encode_image(images, normalize=True), model.encode_text(TEXTS, normalize=True)])


def watch_open_clip(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The image and text transformers of open_clip's models that are made from now on, the image's first."""
    parts: list[weakref.ref[Any]] = []
    build = open_clip.CLIP.__init__

    def record(self: Any, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        parts.extend([weakref.ref(self.visual), weakref.ref(self.transformer)])

    monkeypatch.setattr(open_clip.CLIP, "__init__", record)
    return parts


def test_openai_models_run_on_our_towers_and_leave_no_plain_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = watch_open_clip(monkeypatch)
    gc.disable()
    try:
        towers = load(folder)
        assert [part() for part in parts] == [None, None], "open_clip's model is still there"
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


def rebuild(folder: Path, vision: dict[str, Any], text: dict[str, Any]) -> None:
    """Another model in the folder, with random weights."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= vision
    config["model_cfg"]["text_cfg"] |= text
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = open_clip.CLIP(**config["model_cfg"]).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")


@pytest.mark.parametrize(
    ("vision", "text", "ours"),
    [
        (OTHER_VISION, {}, (False, True)), (RESNET, {}, (False, True)), ({}, OTHER_TEXT, (True, False)),
        (OTHER_VISION, OTHER_TEXT, (False, False)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_towers_of_another_build_are_left_to_open_clip(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    vision: dict[str, Any],
    text: dict[str, Any],
    ours: tuple[bool, bool],
    dtype: torch.dtype,
) -> None:
    rebuild(folder, vision, text)
    expected = embed_by_open_clip(folder)
    parts = watch_open_clip(monkeypatch)
    gc.disable()
    try:
        towers = load(folder, dtype)
        *_, image_tower, text_tower = parts
        assert (image_tower() is None, text_tower() is None) == ours, "a tower that ours replaced is still there"
        assert all(part() is None for part in parts[:-2])
    finally:
        gc.enable()
    assert is_ours(towers) == ours
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(embed(towers, dtype), expected, atol=tolerance, rtol=0)


def test_models_that_cannot_be_looked_at_first_are_left_to_open_clip(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "_build_empty", lambda source: None)
    towers = load(folder)
    assert is_ours(towers) == (False, False)
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
