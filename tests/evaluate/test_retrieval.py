"""Retrieval against plain loops over random scores, and its models against transformers, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Blip2ForImageTextRetrieval

from capfilt.errors import CapfiltError, UsageError
from capfilt.evaluate import retrieval
from capfilt.evaluate.retrieval import evaluate_retrieval
from capfilt.evaluate.retrieval_models import RetrievalOptions, load_retrieval_model
from capfilt.models.blip2 import Stage1
from capfilt.models.qformer import QFormerConfig
from capfilt.train.saved import save_stage1
from capfilt.weights.albef import load_trainable_albef, save_albef
from capfilt.weights.image_encoders import load_image_encoder
from capfilt.weights.model_files import load_tokenizer
from tests import factories
from tests.models.small_vits import build_original_albef, build_their_encoders, build_timm
from tests.train import small_models

CPU = torch.device("cpu")
PICTURES = [factories.draw_picture(seed) for seed in range(7)]
TEXTS = [
    "a red dog",
    "Two cats!",
    "a tree near a house",
    "the sky is blue and the grass is green and there are many dogs running behind a car",
    "two small yellow stars",
    "a photo",
    "a man standing in front of a large white house with a dog",
    "blue",
    "a bright red circle above three dark squares",
]
OWNERS = [0, 1, 1, 2, 3, 4, 5, 6, 6]


class Table:
    """A model whose embeddings and match logits are given: a picture's first pixel and a text are their numbers."""

    device, computing = CPU, "float32 on cpu"

    def __init__(self, images_NQE: Tensor, texts_ME: Tensor, logits_NM: Tensor, batch_size: int) -> None:
        self.images, self.texts, self.logits, self.image_batch_size = images_NQE, texts_ME, logits_NM, batch_size
        self.asked: list[tuple[int, int]] = []

    def prepare(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture))[0, 0, 0].long()

    def encode_images(self, prepared: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(prepared))[:, None, None].float()

    def embed_images(self, features_BPD: Tensor) -> Tensor:
        return self.images[features_BPD[:, 0, 0].long()]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(text)] * (1 + int(text) % 3) for text in texts]

    def embed_texts(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        return self.texts[[text[0] for text in tokens]]

    def itm_logits(self, features_BPD: Tensor, images: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        assert list(images) == sorted(images)
        pairs = [(int(features_BPD[image, 0, 0]), text[0]) for image, text in zip(images, tokens, strict=True)]
        self.asked += pairs
        return torch.stack([self.logits[pair] for pair in pairs])


def numbered_pictures(number: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((2, 2, 3), n, np.uint8)) for n in range(number)]


def recall_by_loops(cosines: np.ndarray, logits: np.ndarray, matches: np.ndarray, k_test: int, k: int) -> float:
    """Rows are queries. The k_test best by cosine stand first, by logit + cosine; the others follow by cosine."""
    hits = []
    for row in range(len(cosines)):
        if not matches[row].any():
            continue
        order = sorted(range(cosines.shape[1]), key=lambda c, row=row: -cosines[row, c])
        best, rest = order[:k_test], order[k_test:]
        best.sort(key=lambda c, row=row: -(cosines[row, c] + logits[row, c]))
        hits.append(any(matches[row, c] for c in [*best, *rest][:k]))
    return 100.0 * sum(hits) / len(hits)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_against_plain_loops(data: st.DataObject) -> None:
    num_images, num_texts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 20))
    num_queries, k_test = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([0, 1, 3, 8, 50]))
    owners = data.draw(st.lists(st.integers(0, num_images - 1), min_size=num_texts, max_size=num_texts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    images = torch.nn.functional.normalize(torch.randn(num_images, num_queries, 8, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(num_texts, 8, generator=generator), dim=-1)
    logits = torch.randn(num_images, num_texts, generator=generator)
    model = Table(images, texts, logits, batch_size=data.draw(st.integers(1, 5)))
    at_once = retrieval.COSINES_AT_ONCE
    retrieval.COSINES_AT_ONCE = data.draw(st.sampled_from([1, 60, at_once]))
    try:
        report, scored = evaluate_retrieval(
            model, numbered_pictures(num_images), [str(n) for n in range(num_texts)],
            image_of_text=owners, k_test=k_test, pairs_at_once=data.draw(st.integers(1, 9)),
        )  # fmt: skip
    finally:
        retrieval.COSINES_AT_ONCE = at_once
    cosines = np.array([[max(float(q @ text) for q in image) for text in texts] for image in images])
    matches = np.array(owners)[None] == np.arange(num_images)[:, None]
    found = [(report.itc, 0)] + ([(report.itm, k_test)] if report.itm else [])
    assert (report.itm is not None) == (scored is not None) == (k_test > 0)
    for recalls, candidates in found:
        for k in (1, 5, 10):
            expected = recall_by_loops(cosines, logits.numpy(), matches, candidates, k)
            assert recalls.image_to_text[k] == pytest.approx(expected)
            expected = recall_by_loops(cosines.T, logits.numpy().T, matches.T, candidates, k)
            assert recalls.text_to_image[k] == pytest.approx(expected)
    assert report.num_images_without_text == num_images - len(set(owners))
    assert len(model.asked) == len(set(model.asked)) == report.num_itm_pairs
    if scored is not None:
        pairs = list(zip(scored.images.tolist(), scored.texts.tolist(), strict=True))
        assert sorted(model.asked) == pairs
        np.testing.assert_allclose(scored.cosines, [cosines[pair] for pair in pairs], atol=1e-6)
        np.testing.assert_array_equal(scored.logits, [logits[pair] for pair in pairs])


def test_what_does_not_fit_is_halved() -> None:
    class Small(Table):
        def encode_images(self, prepared: Sequence[Tensor]) -> Tensor:
            if len(prepared) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().encode_images(prepared)

        def itm_logits(self, features_BPD: Tensor, images: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
            if len(images) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().itm_logits(features_BPD, images, tokens)

    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(9, 2, 4, generator=generator), torch.randn(9, 4, generator=generator)
    logits = torch.randn(9, 9, generator=generator)
    pictures, numbers = numbered_pictures(9), [str(n) for n in range(9)]
    reports = [
        evaluate_retrieval(kind(images, texts, logits, batch_size=7), pictures, numbers, k_test=4)[0]
        for kind in (Table, Small)
    ]
    assert reports[0].itm == reports[1].itm
    assert reports[0].itc == reports[1].itc


def test_a_model_that_gives_one_score_has_no_recall() -> None:
    ones = torch.ones(20, 1, 4) / 2
    model = Table(ones, ones[:, 0], torch.zeros(20, 20), batch_size=8)
    report, _ = evaluate_retrieval(model, numbered_pictures(20), [str(n) for n in range(20)], k_test=12)
    assert report.itc.mean == 0.0
    assert report.itm is not None
    assert report.itm.mean == 0.0


def test_what_cannot_be_evaluated() -> None:
    ones = torch.ones(3, 1, 4) / 2
    model = Table(ones, ones[:, 0], torch.full((3, 3), float("nan")), batch_size=2)
    with pytest.raises(UsageError, match="0 images and 3 texts"):
        evaluate_retrieval(model, [], ["0", "1", "2"], image_of_text=[0, 0, 0])
    with pytest.raises(CapfiltError, match="no numbers"):
        evaluate_retrieval(model, numbered_pictures(3), ["0", "1", "2"], k_test=2)
    model.texts[1, 1] = float("inf")
    with pytest.raises(CapfiltError, match="no numbers"):
        evaluate_retrieval(model, numbered_pictures(3), ["0", "1", "2"])


# --- models beside transformers -----------------------------------------------------------------------------


def all_scores(name: Path, **options: str) -> tuple[Tensor, Tensor]:
    """Cosines and match logits (N, M) of every pair, by way of the evaluation."""
    model = load_retrieval_model(str(name), RetrievalOptions(device="cpu", image_batch_size=3, **options))
    report, scored = evaluate_retrieval(
        model, PICTURES, TEXTS, image_of_text=OWNERS, k_test=len(TEXTS), pairs_at_once=17
    )
    assert scored is not None
    assert report.num_itm_pairs == len(PICTURES) * len(TEXTS)
    shape = (len(PICTURES), len(TEXTS))
    return torch.from_numpy(scored.cosines).view(shape), torch.from_numpy(scored.logits).view(shape)


def texts_of(folder: Path) -> list[dict[str, Tensor]]:
    """Each text alone, so without padding, in lower case and without marks."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [dict(tokenizer(text.lower().rstrip("!"), return_tensors="pt")) for text in TEXTS]


@pytest.fixture(scope="module")
def filter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval") / "filter"
    factories.save_filter(folder)
    return folder


@pytest.mark.parametrize("first_token", ["enc", "cls"])
@torch.inference_mode()
def test_blip_is_that_of_transformers(filter_dir: Path, first_token: str) -> None:
    from transformers import BlipForImageTextRetrieval, BlipImageProcessor

    theirs = BlipForImageTextRetrieval.from_pretrained(filter_dir).eval()
    pixels = BlipImageProcessor.from_pretrained(filter_dir)(PICTURES, return_tensors="pt").pixel_values
    cosines, logits = torch.empty(len(PICTURES), len(TEXTS)), torch.empty(len(PICTURES), len(TEXTS))
    for t, inputs in enumerate(texts_of(filter_dir)):
        for p in range(len(PICTURES)):
            ids = inputs["input_ids"].clone()
            own = {"pixel_values": pixels[p : p + 1], "attention_mask": inputs["attention_mask"]}
            cosines[p, t] = theirs(input_ids=ids, use_itm_head=False, **own).itm_score.item()
            if first_token == "enc":
                ids[:, 0] = len(factories.VOCABULARY) + 1
            logits[p, t] = theirs(input_ids=ids, use_itm_head=True, **own).itm_score[0, 1].item()
    found = all_scores(filter_dir, first_token=first_token)
    torch.testing.assert_close(found[0], cosines, atol=2e-5, rtol=0)
    torch.testing.assert_close(found[1], logits, atol=2e-4, rtol=0)
    assert logits.std(dim=0).min() > 0.01


def test_an_original_checkpoint_gives_the_scores_of_its_folder(tmp_path: Path) -> None:
    vocabulary = factories.read_bert_vocabulary()
    config = factories.original_config(vocabulary_size=len(vocabulary))
    theirs = factories.save_filter(tmp_path / "folder", config=config)
    (tmp_path / "original").mkdir()
    factories.save_original(tmp_path / "original" / "model.pth", theirs.state_dict())
    for folder in ("folder", "original"):
        factories.save_tokenizer(tmp_path / folder, vocabulary)
    expected = all_scores(tmp_path / "folder")
    for found, wanted in zip(all_scores(tmp_path / "original" / "model.pth"), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def stage1_dir(filter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    encoder = load_image_encoder(str(filter_dir), CPU)
    config = QFormerConfig(
        num_queries=5, width=32, depth=4, num_heads=4, mlp_width=64, vision_width=48, max_positions=40,
        vocab_size=len(factories.VOCABULARY) + 1, dropout=0.0,
    )  # fmt: skip
    eps, dec_token_id = encoder.vision.config.layer_norm_eps, len(factories.VOCABULARY)
    stage = Stage1(config, embed_dim=16, dec_token_id=dec_token_id, vision_norm_eps=eps)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(6.0) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("retrieval") / "stage1"
    save_stage1(folder, encoder, stage, load_tokenizer(filter_dir), 16)
    return folder


@torch.inference_mode()
def test_stage1_is_that_of_transformers(stage1_dir: Path) -> None:
    from transformers import BlipImageProcessor

    theirs = Blip2ForImageTextRetrieval.from_pretrained(stage1_dir).eval()
    pixels = BlipImageProcessor.from_pretrained(stage1_dir)(PICTURES, return_tensors="pt").pixel_values
    cosines, logits = torch.empty(len(PICTURES), len(TEXTS)), torch.empty(len(PICTURES), len(TEXTS))
    for t, inputs in enumerate(texts_of(stage1_dir)):
        for p in range(len(PICTURES)):
            own = {"pixel_values": pixels[p : p + 1], **inputs}
            cosines[p, t] = theirs(**own).logits_per_image.item()
            logits[p, t] = theirs(**own, use_image_text_matching_head=True).logits_per_image[0, 1].item()
    found = all_scores(stage1_dir, resizer="torchvision")
    torch.testing.assert_close(found[0], cosines, atol=2e-5, rtol=0)
    torch.testing.assert_close(found[1], logits, atol=2e-4, rtol=0)
    assert logits.std(dim=0).min() > 0.01
    assert (all_scores(stage1_dir)[0] - cosines).abs().max() > 0, "pillow resizes a little otherwise"


@pytest.fixture(scope="module")
def albef_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ALBEF.pth with BERT's tokenizer beside it."""
    folder = tmp_path_factory.mktemp("retrieval") / "albef"
    folder.mkdir()
    factories.save_tokenizer(folder)
    torch.save({"model": build_original_albef(len(factories.VOCABULARY))}, folder / "ALBEF.pth")
    save_albef(folder / "ours", load_trainable_albef(str(folder / "ALBEF.pth")))
    return folder


@pytest.mark.parametrize("name", ["ALBEF.pth", "ours"])
@torch.inference_mode()
def test_albef_is_that_of_timm_and_transformers(albef_dir: Path, name: str) -> None:
    from transformers import BlipImageProcessor

    state = torch.load(albef_dir / "ALBEF.pth", weights_only=True)["model"]
    pixels = BlipImageProcessor.from_pretrained(albef_dir / "ours")(PICTURES, return_tensors="pt").pixel_values
    features = build_timm().forward_features(pixels)
    heads = {part: state[f"{part}.weight"] for part in ("vision_proj", "text_proj", "itm_head")}
    biases = {part: state[f"{part}.bias"] for part in heads}
    images = torch.nn.functional.normalize(features[:, 0] @ heads["vision_proj"].T + biases["vision_proj"], dim=-1)
    text_encoder, fusion_encoder = build_their_encoders(state)
    cosines, logits = torch.empty(len(PICTURES), len(TEXTS)), torch.empty(len(PICTURES), len(TEXTS))
    for t, inputs in enumerate(texts_of(albef_dir / "ours")):
        text = text_encoder(**inputs).last_hidden_state
        own = torch.nn.functional.normalize(text[:, 0] @ heads["text_proj"].T + biases["text_proj"], dim=-1)
        cosines[:, t] = images @ own[0]
        no_mask = torch.zeros(1, 1, text.shape[1], text.shape[1])
        for p in range(len(PICTURES)):
            fused = fusion_encoder(text, attention_mask=no_mask, encoder_hidden_states=features[p : p + 1])
            logits[p, t] = (fused.last_hidden_state[0, 0] @ heads["itm_head"].T + biases["itm_head"])[1]
    found = all_scores(albef_dir / name)
    torch.testing.assert_close(found[0], cosines, atol=2e-5, rtol=0)
    torch.testing.assert_close(found[1], logits, atol=5e-4, rtol=0)
    assert logits.std(dim=0).min() > 0.01


@pytest.mark.parametrize("kind", ["filter", "stage1"])
def test_reduced_precision_is_near(filter_dir: Path, stage1_dir: Path, kind: str) -> None:
    folder = {"filter": filter_dir, "stage1": stage1_dir}[kind]
    exact, near = (all_scores(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for a, b, limit in zip(exact, near, (0.1, 0.5), strict=True):
        assert 0 < (a - b).abs().max() < limit


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    opt = small_models.save_opt(tmp_path / "opt")
    with pytest.raises(UsageError, match="is a 'opt' model; expected one of 'blip', 'blip-2', 'albef'"):
        load_retrieval_model(str(opt), RetrievalOptions(device="cpu"))
    with pytest.raises(UsageError, match="There is no retrieval model"):
        load_retrieval_model(str(tmp_path / "nothing"), RetrievalOptions(device="cpu"))
