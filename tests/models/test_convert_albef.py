"""ALBEF's weights: the original's layout both ways, strictly, and the start from BERT."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from capfilt.errors import UsageError
from capfilt.models.albef import Albef, AlbefConfig
from capfilt.models.convert_albef import from_bert, from_original, sizes_from_original, to_original, without_copies
from capfilt.models.vit import VisionTransformer
from tests.models.small_vits import build_original_albef, saved_state

DEPTHS = {"vision_depth": 2, "text_depth": 2, "fusion_depth": 2}


@pytest.mark.parametrize("momentum", [True, False])
def test_there_and_back_is_what_it_was(momentum: bool) -> None:
    state = build_original_albef(50, momentum=momentum)
    vit, config, embed_dim = sizes_from_original(state)
    assert (vit.depth, vit.width, vit.image_size_px, vit.patch_size_px) == (2, 64, 32, 8)
    assert (config.depth, config.text_depth, config.width, config.max_positions, embed_dim) == (4, 2, 64, 40, 24)
    weights = from_original(state, **DEPTHS)
    model = Albef(VisionTransformer(vit), config, embed_dim=embed_dim)
    model.load_state_dict(weights.model)
    assert weights.temperature.tolist() == pytest.approx([0.05])
    assert (weights.momentum is not None) == momentum
    back = to_original(weights, **DEPTHS)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].shape == state[name].shape for name in state)
    once = without_copies(state)
    assert len(state) - len(once) == (6 if momentum else 3)
    assert from_original(once, **DEPTHS).model.keys() == weights.model.keys()


def test_the_queue_and_the_momentum_encoders_are_their_own() -> None:
    state = build_original_albef(50)
    momentum = from_original(state, **DEPTHS).momentum
    assert momentum is not None
    assert torch.equal(momentum["queue.images"], state["image_queue"].T)
    assert torch.equal(momentum["queue.texts"], state["text_queue"].T)
    assert int(momentum["queue.place"]) == 3
    assert torch.equal(momentum["model.vision.class_embedding"], state["visual_encoder_m.cls_token"])
    name = "encoder.layer.3.crossattention.self.key.weight"
    assert torch.equal(momentum["model.text.layers.3.cross_attention.key.weight"], state[f"text_encoder_m.bert.{name}"])
    assert not any("itm_head" in name for name in momentum)


@pytest.mark.parametrize(
    ("missing", "unknown"),
    [
        ("itm_head.bias", "itm_head_m.bias"),
        ("text_encoder.bert.encoder.layer.2.crossattention.self.key.bias", "text_encoder.bert.pooler.dense.bias"),
        ("queue_ptr", "idx_queue"),
        ("visual_encoder_m.norm.weight", "visual_encoder_m.norm.surprise"),
        ("temp", "temperature"),
    ],
)
def test_missing_and_unknown_keys_are_named(missing: str, unknown: str) -> None:
    state = build_original_albef(50)
    state[unknown] = state.pop(missing)
    with pytest.raises(UsageError) as raised:
        from_original(state, **DEPTHS)
    assert f"missing: {missing}; unknown: {unknown}." in str(raised.value)


def test_copies_that_differ_are_refused() -> None:
    for name in ("text_encoder", "text_encoder_m"):
        state = build_original_albef(50)
        state[f"{name}.cls.predictions.decoder.weight"] += 1
        with pytest.raises(UsageError, match="differ in this checkpoint"):
            from_original(state, **DEPTHS)


def test_other_checkpoints_are_refused() -> None:
    state = build_original_albef(50)
    with pytest.raises(UsageError, match="no ALBEF from pre-training: it lacks text_encoder"):
        sizes_from_original({"visual_encoder.cls_token": torch.zeros(1)})
    plain = {name: tensor for name, tensor in state.items() if "crossattention" not in name}
    with pytest.raises(UsageError, match=r"Layers \[\] of 4 attend to the image"):
        sizes_from_original(plain)


@pytest.mark.parametrize("with_head", [True, False])
def test_text_side_starts_as_bert(with_head: bool) -> None:
    torch.manual_seed(0)
    sizes = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    bert = (BertForMaskedLM(sizes) if with_head else BertModel(sizes)).eval()
    config = AlbefConfig(
        vocab_size=50, width=64, depth=3, text_depth=2, num_heads=2, mlp_width=96, max_positions=40, vision_width=64
    )
    start = from_bert(saved_state(bert), config)
    model = Albef(VisionTransformer(sizes_from_original(build_original_albef(50))[0]), config).eval()
    state = model.state_dict()
    assert start.keys() <= state.keys()
    assert {name for name in state if name.startswith(("text.", "head."))} - start.keys() == {
        name for name in state if "cross_" in name or (name.startswith("head.") and not with_head)
    } | {"head.vocabulary.weight"}
    model.load_state_dict(state | start | {"head.vocabulary.weight": start["text.word_embedding.weight"]})
    tokens = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.text.encode(tokens, tokens > 0)
        expected = bert(tokens, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_bert_with_fewer_layers_is_refused() -> None:
    sizes = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config = AlbefConfig(vocab_size=9, width=8, depth=2, text_depth=1, num_heads=1, mlp_width=8, vision_width=8)
    with pytest.raises(UsageError, match="lacks 16 weights of 2 layers, such as .*layer.1"):
        from_bert(saved_state(BertModel(sizes)), config)
