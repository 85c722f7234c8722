"""CIDEr, BLEU and ROUGE-L: beside pycocoevalcap called plainly, and by hand."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

import pycocoevalcap
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from capfilt.errors import CapfiltError, MissingPackageError, UsageError
from capfilt.evaluate import caption_metrics
from capfilt.evaluate.caption_metrics import METRICS, check_tokenizer, score_captions

REFERENCES = {
    1: ["A man's red helmet, on a (small) moped!", "Man riding a motor bike -- on a dirt road."],
    "b.jpg": ["A woman cutting a large white sheet cake.", "A woman isn't cutting; she eats 1,000 cakes..."],
    3: ["Zwei Café-Gäste in Zürich", 'A "dog" & a cat', "a dog"],
    4: ["the the the", "a bird"],
}
CAPTIONS = {1: "a man riding a small moped", "b.jpg": "A woman is cutting a cake.", 3: "a dog and a cafe", 4: ""}


def test_figures_are_those_of_pycocoevalcap() -> None:
    found = score_captions(CAPTIONS, REFERENCES)
    tokenizer = PTBTokenizer()
    references = tokenizer.tokenize({key: [{"caption": t} for t in texts] for key, texts in REFERENCES.items()})
    captions = tokenizer.tokenize({key: [{"caption": text}] for key, text in CAPTIONS.items()})
    bleu = Bleu(4).compute_score(references, captions, verbose=0)[0]
    cider, rouge = Cider().compute_score(references, captions)[0], Rouge().compute_score(references, captions)[0]
    assert found.metrics == pytest.approx(dict(zip(METRICS, [100 * f for f in (cider, *bleu, rouge)], strict=True)))
    assert found.metrics["CIDEr"] > 0


@pytest.mark.parametrize("tokenizer", ["ptb", "plain"])
def test_figures_by_hand(tokenizer: str) -> None:
    """One caption of four words against one of five, four in common and in order; CIDEr of one image is 0."""
    found = score_captions({1: "A red dog runs"}, {1: ["a red dog runs away."]}, tokenizer).metrics
    brevity = 2.718281828459045 ** (1 - 5 / 4)
    for n in range(1, 5):
        assert found[f"BLEU-{n}"] == pytest.approx(100 * brevity)
    precision, recall = 1.0, 0.8
    assert found["ROUGE-L"] == pytest.approx(100 * (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))
    assert found["CIDEr"] == 0.0
    same = score_captions(
        {1: "a red dog runs", 2: "two cats sit still"}, {1: ["a red dog runs"], 2: ["two cats sit still"]}
    )
    assert same.metrics == pytest.approx({**dict.fromkeys(METRICS, 100.0), "CIDEr": 1000.0})


def test_a_line_break_of_any_kind_stays_in_its_caption() -> None:
    breaks = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\u2028", "\u2029"]
    captions = {n: f"a dog{mark}runs number {n}" for n, mark in enumerate(breaks)}
    plain = {n: f"a dog runs number {n}" for n in captions}
    references = {n: [f"the dog runs fast number {n}", "two cats"] for n in captions}
    assert score_captions(captions, references) == score_captions(plain, references)


def test_ascii_locale_and_nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(pycocoevalcap.__path__[0])
    before = sorted(package.rglob("*"))
    usual = score_captions({1: "zürich café"}, {1: ["Zürich café", "x"]})
    monkeypatch.setenv("LC_ALL", "C")
    assert score_captions({1: "zürich café"}, {1: ["Zürich café", "x"]}) == usual
    assert usual.metrics["BLEU-1"] == pytest.approx(100)
    assert sorted(package.rglob("*")) == before


def fake_java(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        (
            "echo 'Unable to locate a Java Runtime.' >&2; exit 1",
            UsageError,
            r"Unable to locate.*apt install default-jre",
        ),
        ("cat", CapfiltError, None),
        ("sleep $SECONDS_ASLEEP", CapfiltError, "did not end within 1 seconds and was stopped"),
        ("echo one", CapfiltError, "gave 2 lines for 3 captions"),
    ],
)
def test_java_that_does_not_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type[CapfiltError], said: str | None
) -> None:
    fake_java(tmp_path, script, monkeypatch)
    seconds = f"30.{os.getpid()}"
    monkeypatch.setenv("SECONDS_ASLEEP", seconds)
    monkeypatch.setattr(caption_metrics, "JAVA_SECONDS", 1.0)
    if said is None:
        assert score_captions({1: "a"}, {1: ["b", "c"]}).tokenizer == "ptb"
        return
    with pytest.raises(kind, match=said):
        score_captions({1: "a"}, {1: ["b", "c"]})
    until = time.monotonic() + 5
    while is_running(["sleep", seconds]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(["sleep", seconds])


def is_running(command: list[str]) -> bool:
    """Whether any process of this machine is `command`."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            found.add(path.read_bytes())
    return "\0".join([*command, ""]).encode() in found


def test_without_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"no `java` on the PATH.*--tokenizer plain"):
        check_tokenizer("ptb")
    check_tokenizer("plain")
    assert score_captions({1: "A dog."}, {1: ["a dog", "x"]}, "plain").metrics["BLEU-1"] == pytest.approx(100)


def test_without_pycocoevalcap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_metrics, "find_spec", lambda _name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'capfilt\[eval\]'"):
        check_tokenizer("plain")
    with pytest.raises(MissingPackageError):
        score_captions({1: "a"}, {1: ["a"]})


def test_unknown_tokenizer() -> None:
    with pytest.raises(UsageError, match="tokenizer is 'nltk'; expected one of ptb, plain"):
        check_tokenizer("nltk")
