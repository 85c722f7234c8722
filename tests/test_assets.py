"""The models shipped in the package: what their cards say, and that plain transformers opens them."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from capfilt.assets import BUILD_ORDER, EMBEDDED_DIR, PRE_TRAINING, make_all
from capfilt.errors import CapfiltError
from capfilt.figures import Figures, measure_captioner, measure_clip, measure_filter, measure_llm

NAMES = ("blip-captioner", "blip-filter", "clip", "opt", "t5")
NUM_SCENES = 50


def card_figures(name: str) -> dict[str, float]:
    card = (EMBEDDED_DIR / name / "README.md").read_text()
    return {figure: float(value) for figure, value in re.findall(r"^\| (.+?) \| ([\d.]+) \|$", card, re.MULTILINE)}


def test_all_are_there_and_small() -> None:
    assert all((EMBEDDED_DIR / name / "README.md").is_file() for name in NAMES)
    num_bytes = sum(file.stat().st_size for file in EMBEDDED_DIR.rglob("*") if file.is_file())
    assert num_bytes <= 40_000_000
    assert {file.suffix for file in EMBEDDED_DIR.rglob("*") if file.is_file()} <= {
        ".json",
        ".txt",
        ".md",
        ".safetensors",
    }


@pytest.mark.parametrize(
    ("name", "measure", "figures"),
    [
        ("blip-captioner", measure_captioner, ("greedy captions true", "nucleus captions true")),
        ("blip-filter", measure_filter, ("AUC against other images' captions", "AUC against one changed fact")),
        ("clip", measure_clip, ("image to text R@5", "text to image R@5")),
        ("opt", measure_llm, ("captions true after a preamble", "answers right after a preamble")),
        ("t5", measure_llm, ("captions true after a preamble", "answers right after a preamble")),
    ],
)
def test_cards_tell_the_truth(name: str, measure: Callable[[Path, int], Figures], figures: tuple[str, ...]) -> None:
    """Within four standard errors of a share measured on so many scenes."""
    expected, found = card_figures(name), measure(EMBEDDED_DIR / name, NUM_SCENES)
    for figure in figures:
        variance = max(expected[figure] * (1 - expected[figure]), 0.02)
        assert abs(found[figure] - expected[figure]) <= 4 * (variance / NUM_SCENES) ** 0.5


@pytest.mark.parametrize(("name", "auto_class"), [("opt", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_language_models_open_in_plain_transformers(name: str, auto_class: Any) -> None:
    folder: Path = EMBEDDED_DIR / name
    model, tokenizer = auto_class.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("a large red ball on the sand.", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(input_ids=inputs.input_ids, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True).strip()


def test_parts_are_made_side_by_side_after_what_they_need() -> None:
    begun: list[str] = []
    ended: list[str] = []

    def run_part(name: str) -> None:
        begun.append(name)
        if name.startswith("blip-") and name != PRE_TRAINING:
            assert PRE_TRAINING in ended
        ended.append(name)

    make_all(run_part, workers=2)
    assert sorted(ended) == sorted([PRE_TRAINING, *BUILD_ORDER])


def test_a_part_that_fails_is_named_when_the_others_are_made() -> None:
    ended: list[str] = []

    def run_part(name: str) -> None:
        if name == PRE_TRAINING:
            raise CapfiltError("no")
        ended.append(name)

    with pytest.raises(CapfiltError, match=f"{PRE_TRAINING}, blip-filter, blip-captioner"):
        make_all(run_part, workers=2)
    assert sorted(ended) == ["clip", "opt", "t5"]


def test_an_interruption_begins_no_further_part() -> None:
    begun: list[str] = []

    def run_part(name: str) -> None:
        begun.append(name)
        if len(begun) == 1:
            # To the process, as a terminal sends it: one sent to this thread would not wake the main thread.
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2)

    with pytest.raises(KeyboardInterrupt):
        make_all(run_part, workers=1)
    assert begun == [PRE_TRAINING]
