"""Captioner, filter and CLIP at the released sizes, beside transformers and open_clip with the same files.

The weights are random, the layouts, sizes and vocabulary the published ones; float32 on a CPU. By default BLIP-base and
CLIP look at a few pictures; CAPFILT_FULL_SIZE=1 takes BLIP-large too, 200 pictures and many batches (more than an hour
on one core, 11 GB of memory). `pytest -rP` shows what was measured.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from capfilt.curation.pictures import normalise, to_square
from capfilt.curation.scorers import ClipScorer
from capfilt.errors import UsageError
from capfilt.models import decoding
from capfilt.models.clip import ClipImageTower, ClipTextTower
from capfilt.models.convert_blip import (
    Kind,
    from_transformers,
    original_to_transformers,
    transformers_names,
)
from capfilt.models.decoding import write_captions
from capfilt.models.matching import match_probabilities
from capfilt.models.med import Captioner, Filter
from capfilt.models.packed import pack_linears
from capfilt.models.sampling import choose_tokens, uniforms
from capfilt.settings import CaptionSettings, RankSettings
from capfilt.weights.blip import LoadedBlip, load_blip
from tests import factories, full_size

FULL = os.environ.get("CAPFILT_FULL_SIZE", "") == "1"
SIZES = ["base", "large"] if FULL else ["base"]
NUM_PICTURES = 200 if FULL else 4
NUM_ENCODED = {"base": 64 if FULL else 3, "large": 16}
"""Pictures that transformers encodes too; of the others its decoder gets our features, which differ by rounding."""
NUM_SCORED = 16 if FULL else 2
NUM_BATCHES = {"base": 24 if FULL else 2, "large": 3}
"""Batches of other pictures in which captions and scores must be the same."""
AT_ONCE = 8
TOLERANCE, FINE_TOLERANCE = 1e-4, 1e-5
"""Of features and logits of a deviation of one or more; of features of unit length, and of ITM, where texts of random
weights differ little."""

KEYS = [f"{number:09d}" for number in range(NUM_PICTURES)]
PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of
END_BIAS = {"base": 8.0, "large": 9.0}
"""Some captions end early, some never."""
DECODINGS = [(1, (5, 20, 1.1)), (1, (9, 16, 1.5)), (3, (5, 20, 1.1) if FULL else (9, 16, 1.5))]
"""Beams; shortest and longest text, repetition penalty: the settings' own, and others."""
TEXTS = [
    "", "a", "a dog", "two cats on a red sofa", "the sky is blue and the grass is green.", "a man with a hat " * 4,
    "a woman standing in front of an old house with a large tree, and there are many birds above the roof of it",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400 if FULL else 600)]


def release() -> None:
    """Give memory back to the system: glibc keeps what was freed in pieces smaller than 32 MB."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def load(path: Path, kind: Kind, dtype: torch.dtype = torch.float32) -> LoadedBlip:
    return load_blip(str(path), kind, device=torch.device("cpu"), dtype=dtype)


@dataclass(frozen=True)
class Model:
    """A BLIP of one released size: its folder, ours as curation runs it, transformers', and pictures they have seen."""

    size: str
    folder: Path
    ours: LoadedBlip
    theirs: Any
    images: Tensor
    """(NUM_PICTURES, 3, 384, 384), normalised."""
    features: Tensor
    """Of the images, ours."""
    their_features: Tensor
    """The same, the first NUM_ENCODED by transformers."""


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """One (kind, size) at a time in memory and on disk."""
    kind, size = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-{size}")
    try:
        if kind == "captioner":
            full_size.save_captioner(folder, size, end_bias=END_BIAS[size])
        else:
            full_size.save_filter(folder, size)
        release()
        yield see_pictures(kind, size, folder)
    finally:
        shutil.rmtree(folder)
        release()


@torch.inference_mode()
def see_pictures(kind: Kind, size: str, folder: Path) -> Model:
    build = BlipForConditionalGeneration if kind == "captioner" else BlipForImageTextRetrieval
    theirs, ours = build.from_pretrained(folder).eval(), load(folder, kind)
    pack_linears(ours.model)
    release()
    number = NUM_PICTURES if kind == "captioner" else NUM_SCORED
    pictures = [to_square(factories.draw_photograph(seed), ours.preparation) for seed in range(number)]
    images = normalise(pictures, ours.preparation, torch.zeros(1))
    features = torch.cat([ours.model.vision(part) for part in images.split(AT_ONCE)])
    their_features = features.clone()
    for start in range(0, min(number, NUM_ENCODED[size]), AT_ONCE):
        part = slice(start, min(start + AT_ONCE, NUM_ENCODED[size]))
        their_features[part] = theirs.vision_model(images[part]).last_hidden_state
    return Model(size, folder, ours, theirs, images, features, their_features)


def of_sizes(kind: Kind) -> Any:
    return pytest.mark.parametrize(
        "model", [pytest.param((kind, size), id=size) for size in SIZES], indirect=True, scope="module"
    )


def largest_difference(what: str, found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, which `pytest -rP` shows."""
    difference = float((found - expected).abs().max())
    print(f"{what}: largest difference {difference:.1e}, standard deviation {expected.std():.2f}")  # noqa: T201
    return difference


def draw_batches(number: int, num_pictures: int) -> list[list[int]]:
    """Batches of one to six pictures in any order, some of them twice; the first has but one."""
    generator = np.random.default_rng(7)
    sizes = [1, 2, *generator.integers(1, 7, number)][:number]
    return [generator.integers(0, num_pictures, size).tolist() for size in sizes]


def record_features(monkeypatch: pytest.MonkeyPatch, tower: type[ClipImageTower] | type[ClipTextTower]) -> list[Tensor]:
    """What towers of a kind give, call by call."""
    method, given = tower.forward, []

    def record(self: Any, *args: Any) -> Tensor:
        given.append(method(self, *args))
        return given[-1]

    monkeypatch.setattr(tower, "forward", record)
    return given


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-L-14-quickgelu"] if FULL else ["ViT-L-14"])
@torch.inference_mode()
def test_clip_gives_the_features_and_scores_of_open_clip_in_any_batch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's own weights are those of the `-quickgelu` model."""
    import open_clip

    path = tmp_path / "clip.safetensors"
    reference: Any = full_size.save_clip(path)
    if name != full_size.CLIP_NAME:
        del reference
        reference = open_clip.create_model(name, pretrained=str(path))
    reference.eval().requires_grad_(False)
    transform: Any = open_clip.image_transform(224, is_train=False)
    images = torch.stack([transform(factories.draw_photograph(seed)) for seed in range(NUM_SCORED)])
    texts = [*TEXTS, ".", "dog " * 75, "cat " * 74, "one bird " * 40]
    tokens = open_clip.get_tokenizer(name)(texts)
    assert {int(length) for length in (tokens != 0).sum(dim=1)} >= {2, 3, 76, 77}
    expected_BE, expected_NE = reference.encode_image(images, normalize=True), reference.encode_text(tokens, True)
    assert expected_BE.std(dim=0).mean() > 0.001, "images would be alike"
    assert expected_NE.std(dim=0).mean() > 0.005, "texts would be alike"

    del reference
    release()

    images_of, texts_of = record_features(monkeypatch, ClipImageTower), record_features(monkeypatch, ClipTextTower)
    scorer = ClipScorer(RankSettings(clip_model=name, clip_weights=str(path), device="cpu", dtype="float32"))
    release()
    path.unlink()
    pixels = [scorer.prepare(factories.draw_photograph(seed)) for seed in range(NUM_SCORED)]
    whole = scorer.score(pixels, [texts] * NUM_SCORED)
    assert largest_difference("image features", torch.cat(images_of), expected_BE) < FINE_TOLERANCE
    assert largest_difference("text features", torch.cat(texts_of), expected_NE) < FINE_TOLERANCE
    assert largest_difference("CLIP scores", torch.tensor(whole), expected_BE @ expected_NE.T) < FINE_TOLERANCE
    assert torch.tensor(whole).std(dim=0).min() > 1e-5
    for chosen in draw_batches(NUM_BATCHES["base"], NUM_SCORED):
        order = np.random.default_rng(len(chosen)).permutation(len(texts))[: 2 + len(chosen)]
        found = scorer.score([pixels[n] for n in chosen], [[texts[index] for index in order]] * len(chosen))
        assert found == [[whole[n][index] for index in order] for n in chosen]
    del scorer
    release()


def record_steps(monkeypatch: pytest.MonkeyPatch) -> dict[float, Tensor]:
    """The logits that decoding chooses from at each step, by the uniform number of its draw."""
    steps: dict[float, Tensor] = {}

    def choose(logits_RV: Tensor, uniforms_R: Tensor, settings: CaptionSettings) -> Tensor:
        steps.update(zip(uniforms_R.tolist(), logits_RV.clone(), strict=True))
        return choose_tokens(logits_RV, uniforms_R, settings)

    monkeypatch.setattr(decoding, "choose_tokens", choose)
    return steps


@of_sizes("captioner")
@torch.inference_mode()
def test_features_and_logits_of_every_step_are_those_of_transformers(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding goes on with a cache, many captions at once; transformers reads each whole caption anew."""
    assert isinstance(model.ours.model, Captioner)
    number = NUM_ENCODED[model.size]
    their_features = model.their_features[:number]
    assert their_features.std(dim=0).mean() > 0.2, "images would be alike"
    assert largest_difference("image features", model.features[:number], their_features) < TOLERANCE

    steps = record_steps(monkeypatch)
    plain = CaptionSettings(num_captions=5, min_length=1, repetition_penalty=1.0, seed=3)
    num_images = min(number, 4 * AT_ONCE if FULL else 2)
    written = write_captions(model.ours.model, model.features[:num_images], KEYS[:num_images], PROMPT, plain)
    assert len({len(text) for own in written for text in own}) > 1, "no caption would leave the batch"
    firsts, worst, num_steps = [], 0.0, 0
    for image, own in enumerate(written):
        rows = torch.full((len(own), plain.max_length), 102)
        for row, text in zip(rows, own, strict=True):
            row[: len(PROMPT) + len(text)] = torch.tensor([*PROMPT, *text])
        image_RPD = their_features[image].expand(len(own), -1, -1)
        mask = torch.ones(image_RPD.shape[:2], dtype=torch.long)
        logits = model.theirs.text_decoder(
            input_ids=rows, encoder_hidden_states=image_RPD, encoder_attention_mask=mask
        ).logits[:, len(PROMPT) - 1 :]
        firsts.append(logits[0, 0])
        for index, text in enumerate(own):
            draws = uniforms(plain.seed, KEYS[image], index, plain.max_length - len(PROMPT))[: len(text) + 1]
            found = torch.stack([steps[float(draw)] for draw in draws])
            worst = max(worst, float((found - logits[index, : len(draws)]).abs().max()))
            num_steps += len(draws)
    assert len(steps) == num_steps
    print(f"logits of {num_steps} steps: largest difference {worst:.1e}, deviation {firsts[0].std():.2f}")  # noqa: T201
    assert worst < TOLERANCE
    assert torch.stack(firsts).std(dim=0).mean() > 0.3, "the image would not matter"
    assert torch.stack(list(steps.values())).std(dim=0).mean() > 0.3


@of_sizes("captioner")
def test_greedy_and_beam_captions_are_those_of_transformers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(model.ours.model, Captioner)
    monkeypatch.setattr(model.theirs.vision_model, "forward", lambda pixel_values, **_: (pixel_values,))
    prompt = torch.tensor([[*PROMPT, 102]])
    assert model.ours.tokenizer(model.ours.prompt).input_ids[1:] == prompt[0, 1:].tolist()
    for num_beams, (min_length, max_length, penalty) in DECODINGS:
        chosen = CaptionSettings(
            decoding="greedy" if num_beams == 1 else "beam", num_beams=num_beams, num_captions=1,
            min_length=min_length, max_length=max_length, repetition_penalty=penalty,
        )  # fmt: skip
        expected, found = [], []
        for start in range(0, NUM_PICTURES, AT_ONCE):
            part = slice(start, start + AT_ONCE)
            seen = model.their_features[part]
            rows = model.theirs.generate(
                pixel_values=seen, input_ids=prompt.repeat(len(seen), 1), num_beams=num_beams, do_sample=False,
                min_length=min_length, max_length=max_length, repetition_penalty=penalty,
            )[:, len(PROMPT) :].tolist()  # fmt: skip
            expected += [[row[: row.index(102)] if 102 in row else row] for row in rows]
            found += write_captions(model.ours.model, model.features[part], KEYS[part], PROMPT, chosen)
        num_equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
        distinct = {tuple(own[0]) for own in found}
        print(  # noqa: T201
            f"{num_beams} beams, {min_length} to {max_length} tokens: {num_equal} of {NUM_PICTURES} captions equal,"
            f" {len(distinct)} distinct, of {len(set(map(len, distinct)))} lengths"
        )
        assert found == expected
        assert len(distinct) > NUM_PICTURES // 3, "captions would be alike"


def captions_of(loaded: LoadedBlip, images: Tensor, chosen: Sequence[int], **changes: Any) -> list[list[list[int]]]:
    """Captions of some images, from the pixels on."""
    assert isinstance(loaded.model, Captioner)
    with torch.inference_mode():
        features = loaded.model.vision(images[list(chosen)].to(loaded.model.vision.class_embedding.dtype))
    return write_captions(loaded.model, features, [KEYS[n] for n in chosen], PROMPT, CaptionSettings(**changes))


@of_sizes("captioner")
def test_captions_depend_on_picture_key_and_seed_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the batch, its order, the neighbours, and how many captions are asked for.

    So do the logits of every step, to the bit: captions alone would seldom show that they do not.
    """
    steps = record_steps(monkeypatch)
    whole = captions_of(model.ours, model.images, range(min(NUM_PICTURES, 24 if FULL else 3)))
    assert len({tuple(text) for own in whole for text in own}) > 4 * len(whole), "captions would be alike"
    whole_steps = dict(steps)
    for number, chosen in enumerate(draw_batches(NUM_BATCHES[model.size], len(whole))):
        num_captions = (5, 10, 3, 1)[number % 4]
        steps.clear()
        found = captions_of(model.ours, model.images, chosen, num_captions=num_captions)
        assert found == [whole[n][:num_captions] for n in chosen]
        assert all(torch.equal(logits, whole_steps[draw]) for draw, logits in steps.items())
    assert captions_of(model.ours, model.images, [0], num_captions=5, seed=1)[0] != whole[0][:5]


@of_sizes("captioner")
def test_original_captioner_is_the_folder(model: Model, tmp_path: Path) -> None:
    check_original("captioner", model, tmp_path)


@of_sizes("filter")
@torch.inference_mode()
def test_itm_logits_are_those_of_transformers_in_any_batch(model: Model) -> None:
    ours, theirs = model.ours.model, model.theirs
    assert isinstance(ours, Filter)
    number = min(NUM_SCORED, NUM_ENCODED[model.size])
    features, their_features = model.features[:number], model.their_features[:number]
    assert largest_difference("image features", features, their_features) < TOLERANCE
    encoded = model.ours.tokenizer(TEXTS, padding=True, truncation=True, max_length=35, return_tensors="pt")
    tokens, mask = encoded.input_ids.clone(), encoded.attention_mask
    tokens[:, 0] = 30523  # [ENC]
    found, expected = [], []
    for own, their_own in zip(features, their_features, strict=True):
        found.append(ours.itm_logits(own[None], tokens, mask.bool()))
        image_NPD = their_own.expand(len(tokens), -1, -1)
        read = theirs.text_encoder(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=image_NPD,
            encoder_attention_mask=torch.ones(image_NPD.shape[:2], dtype=torch.long),
        )  # fmt: skip
        expected.append(theirs.itm_head(read.last_hidden_state[:, 0]))
    logits_BN2 = torch.stack(expected)
    assert largest_difference("ITM logits", torch.stack(found), logits_BN2) < FINE_TOLERANCE
    assert logits_BN2.std(dim=0).mean() > 1000 * FINE_TOLERANCE, "the image would not matter"
    assert logits_BN2.std(dim=1).mean() > 300 * FINE_TOLERANCE, "the text would not matter"

    texts = [row[: int(length)] for row, length in zip(tokens.tolist(), mask.sum(dim=1), strict=True)]
    whole = match_probabilities(ours, features, [texts] * number)
    assert largest_difference("ITM scores", torch.tensor(whole), logits_BN2.softmax(dim=2)[:, :, 1]) < FINE_TOLERANCE
    for chosen in draw_batches(NUM_BATCHES[model.size], number):
        orders = [np.random.default_rng(n).permutation(len(texts))[: 1 + n % len(texts)] for n in range(len(chosen))]
        scores = match_probabilities(
            ours, ours.vision(model.images[chosen]), [[texts[index] for index in order] for order in orders]
        )
        assert scores == [[whole[n][index] for index in order] for n, order in zip(chosen, orders, strict=True)]


@of_sizes("filter")
def test_original_filter_is_the_folder(model: Model, tmp_path: Path) -> None:
    """Its momentum copies and queues are left aside."""
    check_original("filter", model, tmp_path)


@torch.inference_mode()
def check_original(kind: Kind, model: Model, tmp_path: Path) -> None:
    """A .pth of the same weights is the same model, but for the layer norms of the image encoder.

    Their epsilon is 1e-5 in the folder's config and 1e-6 in the original's code, so transformers gets that too.
    """
    path = tmp_path / "model.pth"
    factories.save_original(path, model.theirs.state_dict())
    factories.save_tokenizer(tmp_path, factories.read_bert_vocabulary())
    original, folder = load(path, kind), load(model.folder, kind)
    path.unlink()
    theirs, ours = original.model.state_dict(), folder.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    vision = original.model.vision
    assert vision.config.layer_norm_eps == 1e-6
    assert replace(vision.config, layer_norm_eps=1e-5) == folder.model.vision.config
    texts = [part.decoder if isinstance(part, Captioner) else part.encoder for part in (original.model, folder.model)]
    assert texts[0].config == texts[1].config
    assert original.preparation == folder.preparation
    del folder, ours, theirs
    release()

    norms = [part for part in model.theirs.vision_model.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}
    for norm in norms:
        norm.eps = 1e-6
    expected = model.theirs.vision_model(model.images[:1]).last_hidden_state
    for norm in norms:
        norm.eps = 1e-5
    assert largest_difference("image features of the .pth", vision(model.images[:1]), expected) < TOLERANCE


@pytest.mark.skipif(not FULL, reason="a minute; CAPFILT_FULL_SIZE=1 runs it")
@of_sizes("captioner")
def test_captions_in_bfloat16_depend_on_picture_key_and_seed_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where oneDNN has bfloat16 kernels (measured with AVX-512 BF16); how torch rounds elsewhere is not known."""
    near = load(model.folder, "captioner", torch.bfloat16)
    pack_linears(near.model)
    if any(type(part) is torch.nn.Linear for part in near.model.modules()):
        pytest.skip("this CPU or torch has no packed bfloat16 layers")
    exact, steps = captions_of(model.ours, model.images, range(12)), record_steps(monkeypatch)
    whole = captions_of(near, model.images, range(12))
    whole_steps, num_steps, num_equal = dict(steps), 0, 0
    for chosen in draw_batches(NUM_BATCHES[model.size] // 2, 12):
        steps.clear()
        assert captions_of(near, model.images, chosen) == [whole[n] for n in chosen]
        num_steps += len(steps)
        num_equal += sum(torch.equal(logits, whole_steps[draw]) for draw, logits in steps.items())
    print(f"logits of {num_equal} of {num_steps} steps are equal to the bit")  # noqa: T201
    num_near = sum(text == other for pair in zip(whole, exact, strict=True) for text, other in zip(*pair, strict=True))
    print(f"{num_near} of {12 * 10} captions in bfloat16 are those in float32")  # noqa: T201


def empty_weights(kind: Kind, size: str) -> dict[str, Tensor]:
    """Zeros by transformers' names and shapes that take no room."""
    build = BlipForConditionalGeneration if kind == "captioner" else BlipForImageTextRetrieval
    with torch.device("meta"):
        theirs = build(full_size.blip_config(size))
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in theirs.state_dict().items()}


LOST = {
    "captioner": ["vision_model.encoder.layers.7.self_attn.qkv.bias", "text_decoder.cls.predictions.bias"],
    "filter": ["vision_model.embeddings.class_embedding", "text_encoder.encoder.layer.11.output.LayerNorm.weight"],
}
FOUND = ["text_encoder.pooler.dense.weight", "vision_proj_n.bias"]


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_every_missing_and_unknown_weight_is_named(kind: Kind, size: str, tmp_path: Path) -> None:
    state = empty_weights(kind, size)
    for copy in ("weight", "bias"):  # of the tied head; it would do for what is missing
        state.pop(f"text_decoder.cls.predictions.decoder.{copy}", None)
    depths = {"vision_depth": {"base": 12, "large": 24}[size], "text_depth": 12}
    for name in transformers_names(kind, **depths).values():
        others = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(UsageError) as error:
            from_transformers(others, kind, **depths)
        assert str(error.value).endswith(f"missing: {name}.")

    for name in LOST[kind]:
        del state[name]
    state |= {name: torch.zeros(1) for name in FOUND}
    full_size.blip_config(size).save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    factories.save_original(tmp_path / "model.pth", state)
    factories.save_tokenizer(tmp_path, factories.read_bert_vocabulary())
    for path in (tmp_path, tmp_path / "model.pth"):
        with pytest.raises(UsageError, match=rf"BLIP {kind}") as error:
            load(path, kind)
        message = str(error.value)
        assert f"missing: {', '.join(sorted(LOST[kind]))}" in message
        assert f"unknown: {', '.join(sorted(FOUND))}." in message


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_original_layout_is_read_whole(kind: Kind, size: str, tmp_path: Path) -> None:
    """No name of transformers' is left in the .pth that these tests write, and none of the original's is kept."""
    state = empty_weights(kind, size)
    factories.save_original(tmp_path / "model.pth", state)
    original = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert not [name for name in original if name.startswith("vision_model") or "layer_norm" in name]
    if kind == "filter":
        assert {name.removesuffix("_queue") for name in original if "queue" in name} == {"image", "text", "idx", "ptr"}
        momentum = {name.partition(".")[0] for name in original if "_m." in name}
        assert momentum == {"visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m"}
    found = {name for name in original_to_transformers(original, kind) if not name.endswith("position_ids")}
    assert found == set(state)
