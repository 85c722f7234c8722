"""Row 15: what a terminal could act upon never gets there, whatever field of whatever command shows it."""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from capfilt.cli.main import app, report
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.data.texts import clean_for_terminal
from tests import factories
from tests.curate.small_runs import make_run, save_models
from tests.stress.conftest import FULL, Figure

TRICKS = {
    "colour": "\x1b[31mred", "title (OSC 0)": "\x1b]0;owned\x07", "link (OSC 8)": "\x1b]8;;http://evil\x1b\\x",
    "clipboard (OSC 52)": "\x1b]52;c;ZXZpbA==\x07", "C1 CSI": "\x9b31mred", "C1 OSC": "\x9d0;owned\x9c",
    "device control": "\x1bP1$r\x1b\\", "backspace": "good\b\b\b\bevil", "carriage return": "good\revil",
    "line feed": "a\nb", "vertical tab": "a\x0bb", "bell": "\x07", "null": "a\0b", "delete": "a\x7fb",
    "right to left": "\u202egnp.exe", "isolates": "\u2066a\u2069\u2067b", "marks": "\u200e\u200f\u061c",
    "zero width": "a\u200bb\ufeff", "tags": "\U000e0041\U000e0042", "lone surrogate": "a\ud800b",
    "line separator": "a\u2028b", "private use": "\ue000", "shift out": "\x0e", "query": "\x1b[c\x1b[6n",
}  # fmt: skip
UNSAFE = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]"
)
"""All but the line feed, which ends lines."""


def fuzzed(rng: random.Random) -> str:
    alphabet = "".join(TRICKS.values()) + "abc äé猫🙂 []();:/\\'\"%{}$`"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60)))


def test_fuzzed_texts(figure: Figure) -> None:
    rng, num = random.Random(5), 10_000 if FULL else 1_000
    for _ in range(num):
        shown = clean_for_terminal(fuzzed(rng), 120)
        assert not UNSAFE.search(shown)
        assert "\n" not in shown
        shown.encode("utf-8")
    figure(15, f"{num:,} of {num:,} fuzzed texts safe")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models")).root


@pytest.mark.parametrize("trick", list(TRICKS)[:: 1 if FULL else 3])
def test_every_field_that_is_printed(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], trick: str, figure: Figure
) -> None:
    """In names of files, settings, recipes, models, tars, captions, addresses, quarantine and labels."""
    text = TRICKS[trick]
    spoken = text.encode("utf-8", "replace").decode().replace("\0", "")  # what an argument of a process can hold
    name = spoken.replace("/", "_")[:40]
    run = make_run(tmp_path / "run", num_shards=1, num_samples=3)
    path = run.stage_file("shards", "00000")
    table, record, _ = read_sealed(path)
    rows = table.to_pylist()
    for row in rows:
        row |= {"caption": spoken, "url": f"http://x/{spoken}"}
    path.write_bytes(sealed_bytes(pa.Table.from_pylist(rows, schema=table.schema), record))
    recipe = tmp_path / "odd.toml"
    recipe.write_text(f"description = {json.dumps(spoken)}\n[caption]\ncaptioner = {json.dumps(name)}\n")
    labels = tmp_path / "labels.csv"
    labels.write_text(f'key,label,text\n"{name}",7,"{name}"\n', encoding="utf-8", errors="replace")
    tar = tmp_path / "a.tar"
    write_tar(tar, name)
    picture = tmp_path / "a.png"
    factories.draw_picture(0).save(picture)
    commands = [
        ("stats", run.path), ("verify", run.path, "--deep"), ("stats", tmp_path / name),
        ("run", recipe, run.path, "--dry-run"), ("run", name, run.path),
        ("caption", run.path, "--captioner", name), ("caption", run.path, "--captioner", models / "captioner"),
        ("import", tar, tmp_path / "imported"), ("import", tmp_path / f"{name}.tar", tmp_path / "other"),
        ("download", tmp_path / f"{name}.csv", tmp_path / "third"),
        ("evaluate", "filter", run.path, "--labels", labels), ("generate", name, picture),
        ("generate", models / "captioner", tmp_path / name), ("select", run.path, "--sources", name),
        ("train", "blip", run.path, "--output", tmp_path / "blip", "--set", f"{name}=1"),
        ("explain", models / "filter", picture, spoken, "--output", tmp_path / "e.png"),
        ("retry", run.path, "--reason", name), (name,), ("stats", run.path, f"--{name}"),
    ]  # fmt: skip
    for command in commands:
        shown = printed(command, capsys)
        assert shown
        assert not UNSAFE.search(shown), (command, shown)
    figure(15, f"{len(TRICKS)} tricks in {len(commands)} commands: only safe characters printed")


def printed(command: tuple[object, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """All that a command writes to the terminal, the message of an error included."""
    capsys.readouterr()
    done = CliRunner().invoke(app, [str(word) for word in command])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        report(done.exception)
    found = capsys.readouterr()
    return done.output + found.out + found.err


def write_tar(path: Path, name: str) -> None:
    buffer = io.BytesIO()
    factories.draw_picture(1).save(buffer, "PNG")
    with tarfile.open(path, "w") as tar:
        for member, content in ((f"{name}.png", buffer.getvalue()), (f"{name}.txt", name.encode())):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
