"""CIDEr, BLEU and ROUGE-L as the field computes them: pycocoevalcap's scorers on words of its PTB tokenizer.

In: one caption and several references of each image. Out: figures times 100, as papers print them.

The tokenizer is Stanford's, in Java, from pycocoevalcap's own jar with its options, but called otherwise: by pipes with
a time limit, so that nothing is written beside the package and nothing hangs; and a caption that holds a line break of
any kind stays one caption. Without Java there are no figures unless `plain` words are asked for: lower case, letters
and digits; their figures must not be compared with published ones. SPICE and METEOR are left out (SPICE's parser is a
download of its own; METEOR is no longer reported by BLIP or BLIP-2).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from capfilt.data.json_lists import Id
from capfilt.errors import CapfiltError, MissingPackageError, UsageError
from capfilt.settings.checks import require_one_of

TOKENIZERS = ("ptb", "plain")
METRICS = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that are left out, as pycocoevalcap does."""
JAVA_SECONDS = 60.0
"""Time for the tokenizer to start; a second more for every JAVA_CAPTIONS_PER_SECOND captions."""
JAVA_CAPTIONS_PER_SECOND = 500

_JAR = "stanford-corenlp-3.4.1.jar"
_LINE_BREAKS = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_PLAIN_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class CaptionScores:
    """Figures of a set of captions."""

    metrics: dict[str, float]
    """Name → mean over the images, times 100 (BLEU: over the corpus)."""
    tokenizer: str
    """ptb, or plain, whose figures compare with no published ones."""


def check_tokenizer(tokenizer: str) -> None:
    """Raises UsageError where captions could not be scored: before hours of work, not after.

    MissingPackageError without pycocoevalcap.
    """
    require_one_of("tokenizer", tokenizer, TOKENIZERS)
    if find_spec("pycocoevalcap") is None:
        raise MissingPackageError("pycocoevalcap", "eval", "Scoring captions")
    if tokenizer == "ptb":
        _split_by_ptb(["A word."])


def score_captions(
    captions: Mapping[Id, str], references: Mapping[Id, Sequence[str]], tokenizer: str = "ptb"
) -> CaptionScores:
    """Score captions against references of the same ids, each of which has at least one.

    Raises UsageError without Java (ptb), MissingPackageError without pycocoevalcap.
    """
    if captions.keys() != references.keys() or not captions or not all(references.values()):
        raise ValueError("captions and references must have the same ids, and every id a reference")
    require_one_of("tokenizer", tokenizer, TOKENIZERS)
    if find_spec("pycocoevalcap") is None:
        raise MissingPackageError("pycocoevalcap", "eval", "Scoring captions")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ids = list(captions)
    texts = [captions[key] for key in ids] + [text for key in ids for text in references[key]]
    split = iter(_split_by_ptb(texts) if tokenizer == "ptb" else _split_plainly(texts))
    found = {key: [next(split)] for key in ids}
    wanted = {key: [next(split) for _ in references[key]] for key in ids}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    cider, _ = Cider().compute_score(wanted, found)
    rouge, _ = Rouge().compute_score(wanted, found)
    return CaptionScores(dict(zip(METRICS, (100 * float(s) for s in (cider, *bleu, rouge)), strict=True)), tokenizer)


def _split_by_ptb(texts: Sequence[str]) -> list[str]:
    """Words of each text with a space between them, in lower case, punctuation left out."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    java = shutil.which("java")
    if java is None:
        raise UsageError(f"There is no `java` on the PATH, which the PTB tokenizer needs. {_REMEDY}")
    jar = Path(ptbtokenizer.__file__).parent / _JAR
    command = [
        java,
        "-Dfile.encoding=UTF-8",
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    lines = "\n".join(_LINE_BREAKS.sub(" ", text) for text in texts)
    seconds = JAVA_SECONDS + len(texts) / JAVA_CAPTIONS_PER_SECOND
    code, output, errors = _run(command, lines.encode(), seconds)
    if code is None:
        raise CapfiltError(
            f"The PTB tokenizer did not end within {seconds:,.0f} seconds and was stopped. Run `{java} -version`: "
            "does it answer?"
        )
    if code != 0:
        said = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise UsageError(f"{java} cannot run the PTB tokenizer ({said[0][:200]}). {_REMEDY}")
    found = output.decode(errors="replace").split("\n")
    if len(found) != len(texts):
        raise CapfiltError(f"The PTB tokenizer gave {len(found):,} lines for {len(texts):,} captions.")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION) for line in found]


def _run(command: Sequence[str], given: bytes, seconds: float) -> tuple[int | None, bytes, bytes]:
    """Exit code (None: out of time), output and errors; what was started, and what that started, is gone afterwards."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            output, errors = process.communicate(given, timeout=seconds)
            return process.returncode, output, errors
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None, b"", b""
            raise


def _split_plainly(texts: Sequence[str]) -> list[str]:
    return [" ".join(_PLAIN_WORD.findall(text.lower())) for text in texts]


_REMEDY = (
    "Install a Java runtime (Debian and Ubuntu: `apt install default-jre-headless`; conda: `conda install openjdk`), "
    "or give --tokenizer plain, whose figures compare with no published ones."
)
