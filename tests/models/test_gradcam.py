"""Grad-CAM against transformers' attentions and autograd, finite differences and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForImageTextRetrieval

from capfilt.models.blip2 import Stage1
from capfilt.models.gradcam import (
    captioner_layers,
    default_layer,
    explain_caption,
    explain_match,
    explain_stage1_match,
    filter_layers,
    kept_map,
    stage1_layers,
)
from capfilt.models.med import Attention, Captioner, Filter, MEDConfig
from capfilt.models.qformer import QFormerConfig
from capfilt.models.text_layout import TextLayout
from capfilt.models.vit import VisionTransformer, ViTConfig, change_image_size
from capfilt.train.saved import load_stage1, save_stage1
from capfilt.weights.blip import load_blip
from capfilt.weights.image_encoders import ImageEncoder
from capfilt.weights.model_files import ImagePreparation
from tests import factories

CPU = torch.device("cpu")
DEPTH, SIDE = 4, 4
CONTENT = [11, 12, 13, 14, 15]
WORDS = [[1], [2, 3], [4], [5]]
"""Of texts with five pieces between the special tokens."""


def random_images(side_px: int = factories.IMAGE_SIZE_PX) -> Tensor:
    return torch.randn(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(8))


class Caught:
    """The attention maps that transformers' modules compute, kept with their gradients."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.maps: list[Tensor] = []
        for module in modules:
            module.register_forward_hook(self._catch)

    def _catch(self, _module: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        output[1].retain_grad()
        self.maps.append(output[1])


def loop_average_over_heads(attention: Tensor, gradient: Tensor) -> list[list[float]]:
    """max(0, gradient x attention) averaged over heads, rows by columns, entry by entry."""
    _, heads, rows, columns = attention.shape
    attention, gradient = attention.detach().double(), gradient.double()
    return [
        [
            sum(max(0.0, float(gradient[0, h, row, column] * attention[0, h, row, column])) for h in range(heads))
            / heads
            for column in range(columns)
        ]
        for row in range(rows)
    ]


def loop_word_maps(rows: list[list[float]], words: list[list[int]]) -> Tensor:
    """Mean over each word's rows, first column left out, on the grid."""
    side = int((len(rows[0]) - 1) ** 0.5)
    maps = torch.zeros(len(words), side, side)
    for number, word in enumerate(words):
        for i in range(side):
            for j in range(side):
                maps[number, i, j] = sum(rows[place][1 + i * side + j] for place in word) / len(word)
    return maps


@pytest.mark.parametrize("side_px", [32, 48])
@pytest.mark.parametrize("layer", range(DEPTH - 1))
def test_filter_maps_are_those_of_transformers(tmp_path: Path, layer: int, side_px: int) -> None:
    theirs = factories.save_filter(tmp_path, seed=1, config=factories.blip_config(depth=DEPTH))
    theirs.config.text_config._attn_implementation = "eager"
    ours = load_blip(str(tmp_path), "filter", device=CPU, dtype=torch.float32).model
    assert isinstance(ours, Filter)
    change_image_size(ours.vision, side_px)
    config, images = ours.encoder.config, random_images(side_px)
    tokens = [config.enc_token_id, *CONTENT, config.sep_token_id]

    caught = Caught(theirs.text_encoder.encoder.layer[layer].crossattention.self)
    ids = torch.tensor([tokens])
    logits = theirs(ids, images, attention_mask=torch.ones_like(ids), interpolate_pos_encoding=True).itm_score
    logits[0, 1].backward()
    rows = loop_average_over_heads(caught.maps[0], caught.maps[0].grad)

    with torch.no_grad():
        features = ours.vision(images)
    found = explain_match(ours, features, tokens, WORDS, layer)
    assert found.words.shape == (4, side_px // 8, side_px // 8)
    assert found.probability == pytest.approx(logits.softmax(dim=1)[0, 1].item(), abs=1e-5)
    scale = max(max(row) for row in rows)
    assert scale > 1e-6
    expected = loop_word_maps(rows, [*WORDS, [1, 2, 3, 4, 5]]) / scale
    torch.testing.assert_close(found.words / scale, expected[:-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.average / scale, expected[-1], atol=1e-4, rtol=0)


def test_no_word_reaches_the_logit_from_the_last_layer(tmp_path: Path) -> None:
    factories.save_filter(tmp_path)
    model = load_blip(str(tmp_path), "filter", device=CPU, dtype=torch.float32).model
    assert isinstance(model, Filter)
    assert filter_layers(model) == [0]
    tokens = [model.encoder.config.enc_token_id, *CONTENT, model.encoder.config.sep_token_id]
    with torch.no_grad():
        features = model.vision(random_images())
    assert not explain_match(model, features, tokens, WORDS, 1).words.any()
    assert explain_match(model, features, tokens, WORDS, 0).words.any()


@pytest.mark.parametrize("layer", range(DEPTH))
def test_captioner_maps_are_those_of_transformers(tmp_path: Path, layer: int) -> None:
    theirs = factories.save_captioner(tmp_path, seed=2, config=factories.blip_config(depth=DEPTH))
    theirs.config.text_config._attn_implementation = "eager"
    ours = load_blip(str(tmp_path), "captioner", device=CPU, dtype=torch.float32).model
    assert isinstance(ours, Captioner)
    assert captioner_layers(ours) == list(range(DEPTH))
    config, images = ours.decoder.config, random_images()
    words = [[3], [4, 5]]  # the first two pieces are the prompt's
    tokens = [config.dec_token_id, *CONTENT, config.sep_token_id]

    caught = Caught(theirs.text_decoder.bert.encoder.layer[layer].crossattention.self)
    features = theirs.vision_model(images).last_hidden_state
    logits = theirs.text_decoder(torch.tensor([tokens[:-1]]), encoder_hidden_states=features).logits[0]
    log_probabilities = [logits[place - 1].log_softmax(dim=0)[tokens[place]] for place in (3, 4, 5)]
    rows: dict[int, list[float]] = {}
    for place, value in zip((3, 4, 5), log_probabilities, strict=True):
        (gradient,) = torch.autograd.grad(value, caught.maps, retain_graph=True)
        rows[place] = loop_average_over_heads(caught.maps[0], gradient)[place - 1]
    scale = max(max(row) for row in rows.values())
    expected = loop_word_maps(list(rows.values()), [[0], [1, 2], [0, 1, 2]]) / scale

    with torch.no_grad():
        ours_features = ours.vision(images)
    found = explain_caption(ours, ours_features, tokens, words, layer)
    torch.testing.assert_close(found.words / scale, expected[:-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.average / scale, expected[-1], atol=1e-4, rtol=0)
    known = torch.stack(log_probabilities).detach()
    assert found.probability == pytest.approx(known.mean().exp().item(), rel=1e-4)
    assert found.word_probabilities is not None
    assert found.word_probabilities.tolist() == pytest.approx(
        [known[0].exp().item(), (known[1] + known[2]).exp().item()], rel=1e-4
    )


@pytest.fixture(scope="module")
def stage1_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random stage-1 model of three layers, the first and the last of which attend to the image."""
    folder = tmp_path_factory.mktemp("gradcam-stage1")
    torch.manual_seed(3)
    vision = VisionTransformer(
        ViTConfig(image_size_px=32, patch_size_px=8, width=48, depth=2, num_heads=4, mlp_width=96)
    )
    vision.norm = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    config = QFormerConfig(
        num_queries=5, width=32, depth=3, num_heads=4, mlp_width=64, vision_width=48, vocab_size=90, max_positions=40
    )
    stage = Stage1(config, embed_dim=16, dec_token_id=88)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.6 if "cross" in name or "query_tokens" in name else 0.3)
    save_tokenizer_dir = folder / "tokenizer"
    factories.save_tokenizer(save_tokenizer_dir)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer_dir)
    save_stage1(folder, ImageEncoder(vision.eval(), {}, ImagePreparation(32)), stage, tokenizer, 16)
    return folder


def attend_as_described(read: list[list[float]], seen: list[list[float]], queries: int, tokens: int) -> Tensor:
    """Each query's map divided among the tokens as it read them, averaged over queries: (tokens, columns)."""
    maps = torch.zeros(tokens, len(seen[0]))
    for query in range(queries):
        total = sum(read[query][queries + token] for token in range(tokens))
        for token in range(tokens):
            share = read[query][queries + token] / total if total > 0 else 0.0
            for column in range(len(seen[0])):
                maps[token, column] += share * seen[query][column] / queries
    return maps


@pytest.mark.parametrize("layer", [0, 2])
def test_qformer_maps_are_those_of_transformers(stage1_dir: Path, layer: int) -> None:
    theirs = Blip2ForImageTextRetrieval.from_pretrained(stage1_dir, attn_implementation="eager").eval()
    saved = load_stage1(stage1_dir, CPU)
    stage, images = saved.stage.eval(), random_images()
    assert stage1_layers(stage) == [0, 2]
    tokens = [2, *CONTENT, 3]

    block = theirs.qformer.encoder.layer[layer]
    caught = Caught(block.attention.attention, block.crossattention.attention)
    ids = torch.tensor([tokens])
    out = theirs(images, ids, torch.ones_like(ids), use_image_text_matching_head=True)
    out.logits_per_image[0, 1].backward()
    read, seen = (loop_average_over_heads(kept, kept.grad) for kept in caught.maps)
    queries = 5
    scale = max(max(row) for row in seen)
    by_token = attend_as_described(read, seen, queries, len(tokens)) / scale
    expected = loop_word_maps(by_token.tolist(), WORDS)
    average = loop_word_maps(seen, [list(range(queries))])[0] / scale

    with torch.no_grad():
        features = saved.encoder.vision(images)
    found = explain_stage1_match(stage, features, tokens, WORDS, layer)
    assert found.probability == pytest.approx(out.logits_per_image.softmax(dim=1)[0, 1].item(), abs=1e-5)
    assert average.max() > 0.01
    assert expected.max() > 0.01
    torch.testing.assert_close(found.words / scale, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.average / scale, average, atol=1e-4, rtol=0)

    everything = explain_stage1_match(stage, features, tokens, [[place] for place in range(len(tokens))], layer)
    torch.testing.assert_close(everything.words.sum(dim=0) / scale, average, atol=1e-4, rtol=0)


# --- finite differences, and the attention's own way -------------------------------------------------------------


def small_filter() -> Filter:
    torch.manual_seed(4)
    vision = VisionTransformer(ViTConfig(image_size_px=6, patch_size_px=2, width=8, depth=1, num_heads=2, mlp_width=8))
    config = MEDConfig(
        vocab_size=20, width=8, depth=3, num_heads=2, mlp_width=8, max_positions=12, vision_width=8, sep_token_id=3,
        dec_token_id=18, enc_token_id=19,
    )  # fmt: skip
    model = Filter(vision, config, embed_dim=4).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model.requires_grad_(False)


@contextmanager
def shifted_map(attention: Attention, entry: tuple[int, int, int], by: float) -> Any:
    """The attention with one entry (head, row, column) of its map shifted, written apart from ours."""
    own = attention.forward

    def forward(hidden: Tensor, key_value: tuple[Tensor, Tensor], mask: Tensor | None = None, **_: Any) -> Tensor:
        heads = attention.num_heads
        batch, rows, width = hidden.shape
        query = attention.query(hidden).reshape(batch, rows, heads, width // heads).permute(0, 2, 1, 3)
        weights = torch.softmax(torch.einsum("bhtd,bhsd->bhts", query, key_value[0]) / (width // heads) ** 0.5, dim=-1)
        weights[(0, *entry)] += by
        together = torch.einsum("bhts,bhsd->bthd", weights, key_value[1]).reshape(batch, rows, width)
        return attention.output(together)

    attention.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        attention.forward = own  # type: ignore[method-assign]


def test_maps_are_what_finite_differences_give() -> None:
    model, layer, heads = small_filter(), 1, 2
    features = torch.randn(1, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    tokens = [19, 5, 6, 7, 3]
    ids = torch.tensor([tokens])
    attention = model.encoder.layers[layer].cross_attention
    with kept_map(attention) as maps:
        model.itm_logits(features, ids, torch.ones_like(ids).bool())

    def logit(entry: tuple[int, int, int], by: float) -> float:
        with shifted_map(attention, entry, by):
            return float(model.itm_logits(features, ids, torch.ones_like(ids).bool())[0, 1])

    found = explain_match(model, features, tokens, [[1], [2], [3]], layer).words.double()
    step, signs = 1e-5, set()
    for place in (1, 2, 3):
        for patch in range(9):
            total = 0.0
            for head in range(heads):
                entry = (head, place, 1 + patch)
                slope = (logit(entry, step) - logit(entry, -step)) / (2 * step)
                signs.add(slope > 0)
                total += max(0.0, slope * float(maps[0].detach()[(0, *entry)]))
            assert float(found[place - 1].flatten()[patch]) == pytest.approx(total / heads, rel=1e-4, abs=1e-8)
    assert signs == {True, False}


def call_plain(attention: Attention, hidden: Tensor, source: Tensor) -> Tensor:
    return attention(hidden, attention.key_value(source))


def call_masked(attention: Attention, hidden: Tensor, source: Tensor) -> Tensor:
    mask = torch.arange(source.shape[1]) < torch.tensor([source.shape[1], 2])[:, None]
    return attention(hidden, attention.key_value(source), mask[:, None, None, :])


def call_causal(attention: Attention, hidden: Tensor, _source: Tensor) -> Tensor:
    return attention(hidden, attention.key_value(hidden), is_causal=True)


def call_laid_out(attention: Attention, hidden: Tensor, source: Tensor) -> Tensor:
    rows = hidden.repeat(2, 1, 1)[:3]
    layout = TextLayout(torch.tensor([1, 0, 1]), num_images=2, num_tokens=hidden.shape[1])
    return attention(rows, attention.key_value(source), layout=layout)


@pytest.mark.parametrize("call", [call_plain, call_masked, call_causal, call_laid_out])
def test_a_kept_map_changes_no_output(call: Callable[[Attention, Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(6)
    attention = Attention(8, 2, 8).double()
    hidden, source = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    expected = call(attention, hidden, source)
    with kept_map(attention) as maps:
        found = call(attention, hidden, source)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(maps[0].sum(dim=3), torch.ones_like(maps[0][..., 0]), atol=1e-12, rtol=0)
    assert torch.equal(call(attention, hidden, source), expected), "its own way again, to the bit"
    assert len(maps) == 1


def test_a_model_is_its_own_again_after_it_was_explained() -> None:
    model = small_filter()
    features = torch.randn(1, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    ids = torch.tensor([[19, 5, 6, 3]])
    before = model.itm_logits(features, ids, torch.ones_like(ids).bool())
    found = explain_match(model, features, ids[0].tolist(), [[1], [2]], 0)
    assert found.probability == pytest.approx(before.softmax(dim=1)[0, 1].item(), abs=1e-7)
    assert torch.equal(model.itm_logits(features, ids, torch.ones_like(ids).bool()), before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="shapes"):
        explain_match(model, features[..., :5], ids[0].tolist(), [[1]], 0)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_swap_is_undone_on_errors_and_when_nested() -> None:
    attention = Attention(8, 2, 8)
    with pytest.raises(KeyError), kept_map(attention):
        raise KeyError
    assert "forward" not in vars(attention)
    hidden = torch.randn(1, 3, 8)
    with kept_map(attention) as outer:
        with kept_map(attention) as inner:
            call_plain(attention, hidden, hidden)
        call_plain(attention, hidden, hidden)
        assert (len(outer), len(inner)) == (1, 1)
    assert "forward" not in vars(attention)


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        (range(11), 12, 7),
        (range(0, 12, 2), 12, 6),
        (range(2), 3, 1),
        ([0, 2], 3, 0),
        ([0], 1, 0),
        (range(23), 24, 14),
    ],
)
def test_the_default_layer_lies_as_deep_as_the_released_choice(layers: list[int], depth: int, expected: int) -> None:
    assert default_layer(list(layers), depth) == expected
