"""CLIP and ITM scores beside open_clip and transformers on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import AutoTokenizer, BlipImageProcessor

from capfilt.curation.scorers import SCORERS, ClipScorer, ItmScorer
from capfilt.errors import UsageError
from capfilt.settings import FilterSettings, RankSettings
from capfilt.weights import find
from tests import factories

PICTURES = [factories.draw_picture(seed) for seed in range(7)]
TEXTS = [
    ["a red dog", "two cats", "a red dog"],
    [],
    ["a tree near a house"],
    ["A Red Dog!", "x" * 400],
    ["two cats", "the sky is blue and the grass is green and there are many dogs running behind a car"],
    [" ".join(["dog"] * 60)],
    ["a photo"],
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    factories.save_clip(path)
    return path


@pytest.fixture(scope="module")
def filter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filter")
    factories.save_filter(path)
    return path


def score(scorer: Any, chosen: list[int] | None = None) -> list[list[float]]:
    numbers = list(range(len(PICTURES))) if chosen is None else chosen
    return scorer.score([scorer.prepare(PICTURES[n]) for n in numbers], [TEXTS[n] for n in numbers])


def flat(scores: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for own in scores for value in own])


@torch.inference_mode()
def open_clip_scores(name: str, weights: str | None = None) -> torch.Tensor:
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(name)
    expected = []
    for picture, own in zip(PICTURES, TEXTS, strict=True):
        image = model.eval().encode_image(transform(picture)[None], normalize=True)
        for text in own:
            expected.append((image @ model.encode_text(tokenizer([text]), normalize=True).T).item())
    return torch.tensor(expected)


def test_clip_scores_are_those_of_open_clip(clip_folder: Path) -> None:
    scorer = ClipScorer(RankSettings(clip_model=str(clip_folder), dtype="float32"))
    found = score(scorer)
    torch.testing.assert_close(flat(found), open_clip_scores(f"local-dir:{clip_folder}"), atol=1e-5, rtol=0)
    assert found[0][0] == found[0][2]
    assert found[1] == []
    assert flat(found).std() > 0.02
    assert scorer.fields["model"].keys() >= {"open_clip_config.json", "open_clip_model.safetensors"}


@pytest.mark.parametrize("name", ["", "embedded"])
def test_clip_scores_in_bfloat16_are_near(clip_folder: Path, name: str) -> None:
    exact, near = (score(ClipScorer(RankSettings(clip_model=name or str(clip_folder), dtype=dtype, device="cpu")))
                   for dtype in ("float32", "bfloat16"))  # fmt: skip
    difference = (flat(near) - flat(exact)).abs()
    assert difference.max() < 0.05
    assert difference.max() > 0, "bfloat16 was not used"


def test_clip_scores_do_not_depend_on_the_batch(clip_folder: Path) -> None:
    scorer = ClipScorer(RankSettings(clip_model=str(clip_folder), dtype="float32"))
    whole = score(scorer)
    for chosen in ([0], [4, 2], [6, 0, 3]):
        torch.testing.assert_close(flat(score(scorer, chosen)), flat([whole[n] for n in chosen]), atol=1e-6, rtol=0)


def test_clip_by_name_and_local_file(clip_folder: Path, tmp_path: Path) -> None:
    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"] |= {"hf_tokenizer_name": "", "tokenizer_kwargs": {}, "vocab_size": 49408}
    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-for-tests.json")
    torch.manual_seed(1)
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("tiny-for-tests").state_dict(), weights)
    scorer = ClipScorer(RankSettings(clip_model="tiny-for-tests", clip_weights=str(weights), dtype="float32"))
    torch.testing.assert_close(flat(score(scorer)), open_clip_scores("tiny-for-tests", str(weights)), atol=1e-5, rtol=0)
    assert scorer.fields["model"].keys() == {"weights.pt", "tiny-for-tests.json"}
    weights.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no file of tensors"):
        ClipScorer(RankSettings(clip_model="tiny-for-tests", clip_weights=str(weights)))
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"ends in '\.npz'"):
        ClipScorer(RankSettings(clip_model="tiny-for-tests", clip_weights=str(tmp_path / "weights.npz")))


def test_clip_names_that_mean_nothing() -> None:
    with pytest.raises(UsageError, match="open_clip has no model 'ViT-Q'"):
        ClipScorer(RankSettings(clip_model="ViT-Q"))
    with pytest.raises(UsageError, match="no weights 'nowhere' for ViT-L-14"):
        ClipScorer(RankSettings(clip_weights="nowhere"))


def test_clip_tag_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="give --clip-weights the file or folder"):
        ClipScorer(RankSettings())


def test_embedded_is_looked_up_in_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip_folder: Path, filter_folder: Path
) -> None:
    (tmp_path / "clip").symlink_to(clip_folder)
    (tmp_path / "blip-filter").symlink_to(filter_folder)
    monkeypatch.setattr(find, "EMBEDDED_DIR", tmp_path)
    for scorer in (
        SCORERS["clip"](RankSettings(clip_model="embedded")),
        SCORERS["itm"](FilterSettings(filter_model="embedded")),
    ):
        assert len(score(scorer)) == len(PICTURES)


@pytest.mark.parametrize("first_token", ["enc", "cls"])
@torch.inference_mode()
def test_itm_scores_are_those_of_transformers(filter_folder: Path, first_token: str) -> None:
    from transformers import BlipForImageTextRetrieval

    model = BlipForImageTextRetrieval.from_pretrained(filter_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(filter_folder)
    processor = BlipImageProcessor.from_pretrained(filter_folder)
    expected = []
    for picture, own in zip(PICTURES, TEXTS, strict=True):
        pixels = processor(picture, return_tensors="pt").pixel_values
        for text in own:
            text = text.lower().replace("!", "")
            words = " ".join(text.split()[:50])
            tokens = tokenizer(words, truncation=True, max_length=35, return_tensors="pt").input_ids
            if first_token == "enc":
                tokens[:, 0] = len(factories.VOCABULARY) + 1
            expected.append(model(pixel_values=pixels, input_ids=tokens).itm_score.softmax(1)[0, 1].item())
    scorer = ItmScorer(FilterSettings(filter_model=str(filter_folder), first_token=first_token, dtype="float32"))
    found = flat(score(scorer))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
    assert found.std() > 0.02


def test_itm_scores_are_equal_to_the_bit_in_any_batch(filter_folder: Path) -> None:
    scorer = ItmScorer(FilterSettings(filter_model=str(filter_folder), dtype="float32"))
    whole = score(scorer)
    for chosen in ([0], [2], [4, 1, 5], [6, 0, 3, 3]):
        assert score(scorer, chosen) == [whole[n] for n in chosen]
    assert score(scorer, [1]) == [[]]


def test_itm_first_token_and_files_are_in_the_fingerprint(filter_folder: Path) -> None:
    plain = ItmScorer(FilterSettings(filter_model=str(filter_folder))).fields
    assert ItmScorer(FilterSettings(filter_model=str(filter_folder), threshold=0.9, batch_size=2)).fields == plain
    assert ItmScorer(FilterSettings(filter_model=str(filter_folder), first_token="cls")).fields != plain
