"""A model's scores of labelled pairs and of experts' pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from capfilt.curation.scorers import ItmScorer
from capfilt.data.annotations import JudgedPair
from capfilt.data.image_sources import ImageFile
from capfilt.data.labels import LabelledText
from capfilt.data.rundir import RunDir
from capfilt.errors import CapfiltError, UsageError
from capfilt.evaluate.filter_report import (
    MAX_TEXTS,
    correlate_judgments,
    score_in_order,
    score_judged,
    score_labelled,
)
from capfilt.evaluate.labelled_images import LabelledImageText, locate_images
from capfilt.settings import FilterSettings
from tests import factories
from tests.train import small_models

TEXTS = ["a red dog", "two cats", "a tree near a house", "the sky", "a red dog", "blue grass", "a small white ring"]


class NoNumbers:
    """A scorer whose weights are damaged."""

    device, batch_size, computing, fields, preparation = torch.device("cpu"), 2, "", dict[str, Any](), None

    def prepare(self, image: Image) -> Tensor:
        return torch.zeros(1)

    def score(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[float("nan")] * len(own) for own in texts]


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        factories.draw_picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> ItmScorer:
    folder = tmp_path_factory.mktemp("models") / "filter"
    factories.save_filter(folder)
    return ItmScorer(FilterSettings(filter_model=str(folder), device="cpu", dtype="float32", batch_size=2))


def one_by_one(scorer: ItmScorer, numbers: list[int]) -> list[float]:
    return [
        scorer.score([scorer.prepare(factories.draw_picture(number))], [[text]])[0][0]
        for number, text in zip(numbers, TEXTS, strict=True)
    ]


def test_pairs_keep_their_order_whatever_image_they_share(scorer: ItmScorer, images_dir: Path) -> None:
    numbers = [2, 0, 2, 3, 2, 1, 0]
    pairs = [
        LabelledImageText(ImageFile(images_dir / f"{number}.png"), text, number > 1, "web" if number else None)
        for number, text in zip(numbers, TEXTS, strict=True)
    ]
    found = score_labelled(scorer, pairs)
    assert found.scores.tolist() == pytest.approx(one_by_one(scorer, numbers), abs=1e-6)
    assert found.labels.tolist() == [number > 1 for number in numbers]
    assert found.sources == ["web", "unknown", "web", "web", "web", "web", "unknown"]
    assert score_labelled(scorer, [LabelledImageText(pairs[0].image, "x", True)]).sources is None
    assert found.scores.std() > 0.005


def test_more_texts_than_are_scored_at_a_time(scorer: ItmScorer, images_dir: Path) -> None:
    texts = [f"a {number} dog" for number in range(2 * MAX_TEXTS + 3)]
    found = score_in_order(scorer, [(ImageFile(images_dir / "1.png"), text) for text in texts])
    expected = scorer.score([scorer.prepare(factories.draw_picture(1))], [texts])[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_experts_judgments(scorer: ItmScorer, images_dir: Path) -> None:
    numbers, scores = (
        [2, 0, 2, 3, 2, 1, 0],
        [(1, 1, 2), (3, 3, 3), (4, 4, 4), (2, 3, 4), (2, 3, 3), (1, 1, 1), (4, 2, 3)],
    )
    judged = [
        JudgedPair(
            f"{number}.png", f"{row % 3}.png#0", TEXTS[row], scores[row], ImageFile(images_dir / f"{number}.png")
        )
        for row, number in enumerate(numbers)
    ]
    pairs, judgments = score_judged(scorer, judged)
    assert pairs.labels.tolist() == [False, True, True, True, False, False, True]
    assert judgments == correlate_judgments(np.array(one_by_one(scorer, numbers)), judged)
    assert (judgments.num_pairs, judgments.all.num_rows) == (7, 21)
    own = sum(f"{number}.png" == f"{row % 3}.png" for row, number in enumerate(numbers))
    assert judgments.num_own_captions == own == 2
    assert judgments.without_own_captions.num_rows == 15


def test_every_judgment_is_a_row() -> None:
    judged = [JudgedPair("a.jpg", f"b.jpg#{n}", "", scores) for n, scores in enumerate([(1, 2), (2, 4), (3, 4)])]
    found = correlate_judgments(np.array([0.1, 0.2, 0.3]), judged).all
    rows = [(0.1, 1), (0.1, 2), (0.2, 2), (0.2, 4), (0.3, 3), (0.3, 4)]
    excess = sum(np.sign(a - c) * np.sign(b - d) for n, (a, b) in enumerate(rows) for c, d in rows[:n])
    assert found.tau_c == pytest.approx(2 * excess / (36 * 2 / 3))


def test_scores_that_are_no_numbers(images_dir: Path) -> None:
    pair = LabelledImageText(ImageFile(images_dir / "0.png"), "a dog", True)
    with pytest.raises(CapfiltError, match="gives 'a dog' the score nan"):
        score_labelled(NoNumbers(), [pair])


def test_images_that_are_not_there(scorer: ItmScorer, images_dir: Path) -> None:
    (images_dir / "text.png").write_text("no picture")
    for name, reason in (("gone.png", "No such file"), ("text.png", "not_an_image: ")):
        pair = LabelledImageText(ImageFile(images_dir / name), "a dog", True)
        with pytest.raises(UsageError, match=rf"{name} cannot be used \({reason}"):
            score_labelled(scorer, [pair])


def test_images_of_files_and_of_a_run(tmp_path: Path, images_dir: Path) -> None:
    run: RunDir = small_models.save_run(tmp_path / "run", [3, 2])
    rows = [
        LabelledText("0.png", None, "a", True, None, "row 1"),
        LabelledText(None, "000010001", "b", False, "web", "row 2"),
    ]
    found = locate_images(rows, images_dir, run)
    assert [one.image.name for one in found] == [str(images_dir / "0.png"), "000010001"]
    assert all(one.image.read().startswith(b"\x89PNG") for one in found)
    with pytest.raises(UsageError, match="row 2 names the key '000010001' of a run"):
        locate_images(rows, images_dir, None)
    with pytest.raises(UsageError, match="1 keys of the pairs are no images of .*'10001'"):
        locate_images([LabelledText(None, "10001", "b", False, None, "row 1")], images_dir, run)
