"""Frozen image encoders from every layout on disk: features, layer, norm to start from, preparation, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from capfilt.errors import UsageError
from capfilt.weights.image_encoders import image_encoder_digest, load_image_encoder
from tests import blip2_layouts, factories

CPU = torch.device("cpu")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def save_clip(folder: Path, *, processor: dict[str, Any] | None = None, depth: int = 3) -> Any:
    """A random CLIPVisionModel's folder with its processor; gives the model."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=depth, num_attention_heads=4, image_size=32,
        patch_size=8,
    )  # fmt: skip
    model = CLIPVisionModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size, **(processor or {})).save_pretrained(folder)
    return model


@torch.no_grad()
def features(name: Path | str, **options: Any) -> torch.Tensor:
    encoder = load_image_encoder(str(name), CPU, **options)
    assert not any(p.requires_grad for p in encoder.vision.parameters())
    assert not encoder.vision.training
    return encoder.vision(IMAGES)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_clip_of_transformers_gives_the_second_last_layer(tmp_path: Path, kind: str) -> None:
    theirs = save_clip(tmp_path)
    if kind == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    hidden = theirs(IMAGES, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features(tmp_path), hidden[-2], atol=1e-4, rtol=0)
    torch.testing.assert_close(features(tmp_path, layer="second-last"), hidden[-2], atol=1e-4, rtol=0)
    torch.testing.assert_close(features(tmp_path, layer="last"), hidden[-1], atol=1e-4, rtol=0)


def test_the_norm_starts_from_the_encoders_where_its_last_block_is_kept(tmp_path: Path) -> None:
    theirs = save_clip(tmp_path)
    last, before = (load_image_encoder(str(tmp_path), CPU, layer=layer) for layer in ("last", "auto"))
    assert torch.equal(last.norm["weight"], theirs.post_layernorm.weight)
    assert torch.equal(before.norm["weight"], torch.ones(48))
    assert torch.equal(before.norm["bias"], torch.zeros(48))


def test_preparation_is_the_processors(tmp_path: Path) -> None:
    save_clip(tmp_path, processor={"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    preparation = load_image_encoder(str(tmp_path), CPU).preparation
    assert (preparation.mean, preparation.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert preparation.image_size_px == 32
    save_clip(tmp_path, processor={"resample": 2})
    with pytest.raises(UsageError, match="asks for resampling 2; expected bicubic"):
        load_image_encoder(str(tmp_path), CPU)


@torch.no_grad()
def test_another_image_size_and_half_precision(tmp_path: Path) -> None:
    theirs = save_clip(tmp_path)
    encoder = load_image_encoder(str(tmp_path), CPU, layer="last", image_size_px=48)
    images = torch.randn(2, 3, 48, 48)
    expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(encoder.vision(images), expected, atol=1e-4, rtol=0)
    assert encoder.preparation.image_size_px == 48
    half = load_image_encoder(str(tmp_path), CPU, dtype=torch.bfloat16)
    found = half.vision(IMAGES)
    assert (half.dtype, found.dtype, half.norm["weight"].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), features(tmp_path), atol=0.15, rtol=0.05)
    with pytest.raises(UsageError, match="image_size_px is 30; expected a multiple of the encoder's patches, 8 px"):
        load_image_encoder(str(tmp_path), CPU, image_size_px=30)


@torch.no_grad()
def second_last_of_open_clip(model: Any) -> torch.Tensor:
    """Token features before the last block, as open_clip's own code computes them."""
    seen: list[torch.Tensor] = []
    last = model.visual.transformer.resblocks[-1]
    handle = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model.eval().encode_image(IMAGES)
    handle.remove()
    return seen[0]


def test_a_folder_of_open_clip(tmp_path: Path) -> None:
    factories.save_clip(tmp_path / "clip")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    expected = second_last_of_open_clip(model)
    torch.testing.assert_close(features(tmp_path / "clip"), expected, atol=1e-4, rtol=0)
    preparation = load_image_encoder(str(tmp_path / "clip"), CPU).preparation
    assert preparation.mean == pytest.approx(factories.MEAN)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_model_that_open_clip_knows_by_name_with_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_gelu: bool
) -> None:
    config = {
        "embed_dim": 24, "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1},
    }  # fmt: skip
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(3)
    model = open_clip.create_model("tiny-clip")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    name = f"open_clip:tiny-clip:{tmp_path / 'weights.safetensors'}"
    torch.testing.assert_close(features(name), second_last_of_open_clip(model), atol=1e-4, rtol=0)
    assert image_encoder_digest(name) != image_encoder_digest(str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("depth", [39, 40])
def test_a_whole_eva_loses_its_last_block_and_a_published_one_does_not(tmp_path: Path, depth: int) -> None:
    """`eva_vit_g.pth`, here 88 wide; whatever comes behind its last block is left out."""
    theirs = blip2_layouts.build_vision(depth)
    state = blip2_layouts.eva_state(theirs.state_dict())
    behind = {"norm.weight": torch.ones(88), "norm.bias": torch.zeros(88), "head.weight": torch.ones(4, 88)}
    torch.save(state | behind, tmp_path / "eva_vit_g.pth")
    with torch.no_grad():
        expected = theirs(IMAGES, output_hidden_states=True).hidden_states[39]
    found = features(tmp_path / "eva_vit_g.pth")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert len(load_image_encoder(str(tmp_path / "eva_vit_g.pth"), CPU).vision.blocks) == 39


def test_openais_layout_as_lavis_has_it(tmp_path: Path) -> None:
    """Of `clip_vit_L.pth` the last block is dropped, of the one in a BLIP-2 none: it was cut before it was saved."""
    torch.manual_seed(4)
    config = {"image_size": 32, "layers": 3, "width": 64, "head_width": 64, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1}
    model = open_clip.CLIP(24, config, text, quick_gelu=True)
    expected = second_last_of_open_clip(model)
    state = model.visual.state_dict()
    torch.save(state, tmp_path / "clip_vit_L.pth")
    torch.testing.assert_close(features(tmp_path / "clip_vit_L.pth"), expected, atol=1e-4, rtol=0)
    behind = ("transformer.resblocks.2.", "ln_post.", "proj")
    cut = {f"visual_encoder.{name}": tensor for name, tensor in state.items() if not name.startswith(behind)}
    path = blip2_layouts.save_pth(tmp_path / "blip2_pretrained_vitL.pth", cut | {"Qformer.x": torch.ones(1)})
    torch.testing.assert_close(features(path), expected, atol=1e-4, rtol=0)
    torch.save({**state, "rel_pos": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match="unknown: rel_pos"):
        features(tmp_path / "odd.pth")


@torch.no_grad()
def test_of_a_blip2_the_image_encoder_alone_is_taken(tmp_path: Path) -> None:
    model = blip2_layouts.build_itm()
    expected = model.vision_model(IMAGES, output_hidden_states=True).hidden_states[-1]
    model.save_pretrained(tmp_path / "folder")
    torch.testing.assert_close(features(tmp_path / "folder"), expected, atol=1e-4, rtol=0)
    norm = load_image_encoder(str(tmp_path / "folder"), CPU).norm
    assert torch.equal(norm["weight"], model.vision_model.post_layernorm.weight)
    path = blip2_layouts.save_pth(tmp_path / "blip2.pth", blip2_layouts.lavis_state(model.state_dict()))
    torch.testing.assert_close(features(path), expected, atol=1e-4, rtol=0)
    state = blip2_layouts.lavis_state(model.state_dict(), with_vision=False)
    path = blip2_layouts.save_pth(tmp_path / "trained.pth", state)
    with pytest.raises(UsageError, match=r"holds no image encoder.*--image-encoder eva_vit_g\.pth"):
        features(path)


@torch.no_grad()
def test_blips_encoder_keeps_its_last_block(tmp_path: Path) -> None:
    factories.save_captioner(tmp_path)
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    hidden = theirs.vision_model(IMAGES, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features(tmp_path), hidden[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(features(tmp_path, layer="second-last"), hidden[-2], atol=1e-4, rtol=0)
    norm = load_image_encoder(str(tmp_path), CPU).norm
    assert torch.equal(norm["bias"], theirs.vision_model.post_layernorm.bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "is no folder here"),
        (lambda folder: "open_clip:ViT-X-99:openai", "open_clip has no model 'ViT-X-99'"),
        (lambda folder: "open_clip:RN50:/nowhere.pt", "no weights '/nowhere.pt' for RN50"),
        (lambda folder: _write(folder / "config.json", '{"model_type": "bert"}').parent, "is a 'bert' model"),
        (lambda folder: _write(folder / "x.pth", "no tensors"), "is not a file of plain tensors"),
    ],
)
def test_what_cannot_be_an_image_encoder(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_image_encoder(str(make(tmp_path)), CPU)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_weights_of_other_sizes_and_a_single_block(tmp_path: Path) -> None:
    save_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["encoder.layers.0.mlp.fc1.weight"] = torch.zeros(90, 48)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"blocks\.0\.fc1\.weight \(90, 48\), expected \(96, 48\)"):
        load_image_encoder(str(tmp_path), CPU)
    save_clip(tmp_path / "one", depth=1)
    with pytest.raises(UsageError, match="has 1 block; expected two or more"):
        load_image_encoder(str(tmp_path / "one"), CPU)
