"""LAVIS's names against transformers' models, small ones and, on the meta device, those of the published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, OPTConfig

from capfilt.errors import UsageError
from capfilt.models.blip2 import Stage1
from capfilt.models.convert_blip2 import EXTRA_STAGE1_KEYS, sizes_from_config, stage1_names, stage2_names, vision_names
from capfilt.models.convert_image_encoders import eva_sizes
from capfilt.models.convert_lavis import from_lavis
from capfilt.models.qformer import QFormer
from capfilt.models.vit import VisionTransformer
from tests import blip2_layouts


def test_stage1_gets_transformers_names_sizes_and_the_head() -> None:
    model = blip2_layouts.build_itm()
    state = blip2_layouts.lavis_state(model.state_dict())
    found = from_lavis(state)
    own = {k: v for k, v in model.state_dict().items() if k.startswith("vision_model.post") or "vision_model" not in k}
    assert found.state.keys() == own.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in own.items())
    expected = sizes_from_config(model.config)[1]
    sizes = {**found.qformer.__dict__, "dropout": expected.dropout}
    assert (sizes, found.embed_dim, found.llm_family) == (expected.__dict__, 16, None)
    assert found.extra.keys() == set(EXTRA_STAGE1_KEYS)
    assert torch.equal(found.extra["lm_head.vocabulary.bias"], state["Qformer.cls.predictions.bias"])
    assert float(found.extra["temperature"]) == pytest.approx(0.05)


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_stage2_without_language_model_and_with_it(llm: str) -> None:
    model = blip2_layouts.build_generation(small_opt(), image_token_id=30)
    state = blip2_layouts.lavis_state(model.state_dict(), llm=llm)
    found = from_lavis(state)
    names = set(stage2_names(sizes_from_config(model.config)[1]).values())
    assert (found.state.keys(), found.llm_family, found.extra) == (names, llm, {})
    assert torch.equal(found.state["language_projection.weight"], model.language_projection.weight)
    assert from_lavis(state | {f"{llm}_model.lm_head.weight": torch.ones(1)}).state.keys() == names


def small_opt() -> OPTConfig:
    return OPTConfig(
        vocab_size=31, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, ffn_dim=96,
        max_position_embeddings=96, word_embed_proj_dim=48,
    )  # fmt: skip


def test_every_odd_key_is_named() -> None:
    state = blip2_layouts.lavis_state(blip2_layouts.build_itm().state_dict())
    gone = ["itm_head.bias", "temp", "Qformer.bert.encoder.layer.1.attention.self.key.weight"]
    odd = ["Qformer.bert.pooler.dense.weight", "prompt"]
    changed = {k: v for k, v in state.items() if k not in gone} | {name: torch.ones(1) for name in odd}
    with pytest.raises(UsageError) as caught:
        from_lavis(changed)
    assert [name for name in gone + odd if name not in str(caught.value)] == []


@pytest.mark.parametrize("ending", ["weight", "bias"])
def test_tied_weights_that_differ_are_refused(ending: str) -> None:
    state = blip2_layouts.lavis_state(blip2_layouts.build_itm().state_dict())
    state[f"Qformer.cls.predictions.decoder.{ending}"] += 1
    with pytest.raises(UsageError, match=rf"predictions\.decoder\.{ending} and .* differ"):
        from_lavis(state)


def test_what_is_no_blip2() -> None:
    with pytest.raises(UsageError, match=r"is no BLIP-2 of LAVIS's: it lacks query_tokens, Qformer"):
        from_lavis({"visual_encoder.cls_token": torch.ones(1)})


def shapes_of(module: nn.Module, leave_out: tuple[str, ...] = ()) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in module.state_dict().items() if not (leave_out and n.startswith(leave_out))}


def on_meta(cls: Any, config: Blip2Config) -> Any:
    with torch.device("meta"):
        return cls(config)


def test_published_sizes_have_the_names_and_shapes_of_our_tables() -> None:
    """`Salesforce/blip2-itm-vit-g` and `Salesforce/blip2-opt-2.7b`, without their numbers."""
    texts = {"vocab_size": 30523, "use_qformer_text_input": True}
    published = on_meta(Blip2ForImageTextRetrieval, Blip2Config(qformer_config=texts))
    vision, qformer = sizes_from_config(published.config)
    assert (vision.width, vision.depth, vision.num_heads, vision.mlp_width) == (1408, 39, 16, 6144)
    with torch.device("meta"):
        tower, stage1 = VisionTransformer(vision), Stage1(qformer)
    millions = sum(p.numel() for p in stage1.parameters()) / 1e6
    assert millions == pytest.approx(188, rel=0.01)
    assert sum(p.numel() for p in tower.parameters()) / 1e6 == pytest.approx(986, rel=0.01)
    names = {f"vision.{k}": v for k, v in vision_names(vision.depth).items()} | stage1_names(qformer)
    ours = {f"vision.{k}": v for k, v in shapes_of(tower, ("norm.",)).items()} | shapes_of(stage1, EXTRA_STAGE1_KEYS)
    del ours["lm_head.vocabulary.weight"]  # tied to the word embedding
    assert {names[k]: shape for k, shape in ours.items()} == shapes_of(published)

    opt = OPTConfig(hidden_size=2560, num_hidden_layers=1, num_attention_heads=32, ffn_dim=10240, vocab_size=50304)
    published = on_meta(Blip2ForConditionalGeneration, Blip2Config(text_config=opt))
    vision, qformer = sizes_from_config(published.config)
    with torch.device("meta"):
        bridge = QFormer(qformer)
    assert sum(p.numel() for p in bridge.parameters()) / 1e6 == pytest.approx(105, rel=0.01)
    ours = {f"qformer.{k}": v for k, v in shapes_of(bridge).items()}
    ours |= {f"projection.{k}": s for k, s in (("weight", torch.Size([2560, 768])), ("bias", torch.Size([2560])))}
    ours |= {f"vision_norm.{k}": torch.Size([1408]) for k in ("weight", "bias")}
    names = stage2_names(qformer)
    expected = shapes_of(published, ("language_model.", "vision_model.em", "vision_model.en"))
    assert {names[k]: shape for k, shape in ours.items()} == expected


def test_published_sizes_in_lavis_layout() -> None:
    texts = {"vocab_size": 30523, "use_qformer_text_input": True}
    published = on_meta(Blip2ForImageTextRetrieval, Blip2Config(qformer_config=texts))
    state: dict[str, Tensor] = {}
    for name, tensor in published.state_dict().items():
        if name.startswith("vision_model."):
            state[name] = tensor
        else:
            state[name] = torch.empty_like(tensor, device="meta")
    lavis = blip2_layouts.lavis_state(state)
    for name in [name for name in lavis if name.startswith("Qformer.cls.predictions.decoder.")]:
        del lavis[name]  # meta tensors cannot be compared
    found = from_lavis(lavis)
    assert found.qformer == sizes_from_config(published.config)[1]
    own = {key.removeprefix("visual_encoder."): t for key, t in lavis.items() if key.startswith("visual_encoder.")}
    assert eva_sizes(own) == sizes_from_config(published.config)[0]
