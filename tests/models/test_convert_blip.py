"""BLIP's weights, in transformers' layout and the original's ↔ ours: nothing lost, nothing foreign taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from capfilt.errors import UsageError
from capfilt.models.convert_blip import (
    Kind,
    config_from_sizes,
    from_transformers,
    original_to_transformers,
    sizes_from_config,
    sizes_from_original,
    to_transformers,
)
from capfilt.models.med import Captioner, Filter
from capfilt.models.vit import VisionTransformer
from tests import factories

DEPTHS = {"vision_depth": 2, "text_depth": 2}


def build_theirs(kind: Kind, config: Any = None) -> Any:
    build = factories.build_captioner if kind == "captioner" else factories.build_filter
    return build(config=config)


def build_ours(kind: Kind, theirs: Any) -> Captioner | Filter:
    vit, med, embed_dim = sizes_from_config(theirs.config.to_dict())
    vision = VisionTransformer(vit)
    return Captioner(vision, med) if kind == "captioner" else Filter(vision, med, embed_dim=embed_dim)


def their_state(theirs: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in theirs.state_dict().items()}


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_every_weight_goes_over_and_back(kind: Kind) -> None:
    theirs = build_theirs(kind)
    state = their_state(theirs)
    ours = build_ours(kind, theirs)
    ours.load_state_dict(from_transformers(state, kind, **DEPTHS), strict=True)
    back = to_transformers(ours.state_dict(), kind, **DEPTHS)
    assert back.keys() == {name for name in state if "predictions.decoder" not in name}
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_missing_and_unknown_weights_are_all_named(kind: Kind) -> None:
    state = their_state(build_theirs(kind))
    gone = ["vision_model.post_layernorm.bias", "vision_model.encoder.layers.1.mlp.fc1.weight"]
    for name in gone:
        del state[name]
    state["vision_model.extra"] = state["text_model.extra"] = torch.zeros(1)
    with pytest.raises(UsageError) as error:
        from_transformers(state, kind, **DEPTHS)
    for name in [*gone, "vision_model.extra", "text_model.extra"]:
        assert name in str(error.value)


def test_untied_vocabulary_is_refused() -> None:
    state = their_state(build_theirs("captioner"))
    state["text_decoder.cls.predictions.decoder.weight"] = torch.zeros(
        state["text_decoder.cls.predictions.decoder.weight"].shape
    )
    with pytest.raises(UsageError, match="differ in this checkpoint"):
        from_transformers(state, "captioner", **DEPTHS)


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_config_goes_over_and_back(kind: Kind) -> None:
    vit, med, embed_dim = sizes_from_config(build_theirs(kind).config.to_dict())
    assert sizes_from_config(config_from_sizes(kind, vit, med, embed_dim=embed_dim)) == (vit, med, embed_dim)
    assert (med.dec_token_id, med.enc_token_id) == (len(factories.VOCABULARY), len(factories.VOCABULARY) + 1)


def test_other_activation_is_refused() -> None:
    config = factories.blip_config().to_dict()
    config["text_config"]["hidden_act"] = "relu"
    with pytest.raises(UsageError, match="relu"):
        sizes_from_config(config)


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_original_layout_reads_as_transformers_does(kind: Kind, tmp_path: Any) -> None:
    theirs = build_theirs(kind, factories.original_config())
    factories.save_original(tmp_path / "blip.pth", theirs.state_dict())
    original = torch.load(tmp_path / "blip.pth", weights_only=True)["model"]
    converted = from_transformers(original_to_transformers(original, kind), kind, **DEPTHS)
    expected = from_transformers(their_state(theirs), kind, **DEPTHS)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    vit, med, _ = sizes_from_original(original, kind)
    assert (vit.depth, vit.width, vit.image_size_px, vit.patch_size_px) == (2, 64, 32, 8)
    assert (med.depth, med.width, med.vision_width, med.max_positions) == (2, 64, 64, 64)
    other: Kind = "filter" if kind == "captioner" else "captioner"
    with pytest.raises(UsageError, match="no original BLIP"):
        sizes_from_original(original, other)


def test_original_of_another_make_is_refused() -> None:
    state = their_state(build_theirs("filter"))
    with pytest.raises(UsageError, match=r"lacks visual_encoder\.blocks"):
        sizes_from_original(state, "filter")


def test_original_with_an_unknown_weight_is_refused() -> None:
    state = {"visual_encoder.cls_token": torch.zeros(1), "surprise.weight": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"surprise\.weight"):
        from_transformers(original_to_transformers(state, "captioner"), "captioner", **DEPTHS)
