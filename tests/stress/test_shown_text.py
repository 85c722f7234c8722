"""Row 15: what a terminal could act upon never gets there, whatever field of whatever command shows it."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sys
import tarfile
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from capfilt.cli.main import app, report
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.data.texts import clean_for_terminal
from tests import factories
from tests.curation.small_runs import make_run, save_models
from tests.hostile_texts import TRICKS, UNSAFE, fuzzed
from tests.stress.conftest import FULL, Figure
from tests.stress.lives import live

HARMLESS = "harmless"


def test_fuzzed_texts(figure: Figure) -> None:
    rng, num = random.Random(5), 10_000 if FULL else 1_000
    for _ in range(num):
        shown = clean_for_terminal(fuzzed(rng), 120)
        assert not UNSAFE.search(shown)
        assert "\n" not in shown
        shown.encode("utf-8")
    figure(15, f"{num:,} of {num:,} fuzzed texts safe")


@pytest.mark.parametrize("trick", TRICKS)
def test_every_trick_is_told_from_what_is_safe(trick: str) -> None:
    assert UNSAFE.search(TRICKS[trick]) or "\n" in TRICKS[trick]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models")).root


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory, models: Path) -> list[str]:
    """What each command writes where the text is a harmless one: most of them repeat it."""
    shown = [printed(command) for command in commands_with(HARMLESS, tmp_path_factory.mktemp("harmless"), models)]
    assert sum(HARMLESS in text for text in shown) >= 17
    return shown


def toml_string(text: str) -> str:
    return '"' + "".join(f"\\U{ord(char):08x}" for char in text) + '"'


def commands_with(text: str, folder: Path, models: Path) -> list[tuple[object, ...]]:
    """Commands that read a text in names of files, settings, recipes, models, tars, captions, addresses and labels.

    JSON carries the text as it is; files in UTF-8 have no lone surrogates, and arguments no NUL either.
    """
    storable = text.encode("utf-8", "replace").decode()
    spoken = storable.replace("\0", "")
    name = spoken.replace("/", "_")[:40]
    live(folder / "whole")
    run = make_run(folder / "run", num_shards=1, num_samples=3)
    path = run.stage_file("shards", "00000")
    table, record, _ = read_sealed(path)
    rows = table.to_pylist()
    for row in rows:
        row |= {"caption": storable, "url": f"http://x/{storable}"}
    path.write_bytes(sealed_bytes(pa.Table.from_pylist(rows, schema=table.schema), record))
    recipe = folder / "odd.toml"
    recipe.write_text(f"description = {toml_string(storable)}\n[caption]\ncaptioner = {toml_string(name)}\n")
    wrong = folder / "wrong.toml"
    key = toml_string(storable)
    wrong.write_text(f"{key} = {key}\n[caption]\n{key} = {key}\ndecoding = {key}\ntop_p = {key}\n")
    labels = folder / "labels.csv"
    cell = '"' + storable.replace('"', '""') + '"'
    labels.write_text(f"key,label,text\n{cell},{cell},{cell}\n", encoding="utf-8")
    json_labels = folder / "labels.jsonl"
    json_labels.write_text(json.dumps({"key": text, "label": text, "text": text}) + "\n")
    odd_model = folder / "model"
    odd_model.mkdir()
    (odd_model / "config.json").write_text(json.dumps({"model_type": text, "architectures": [text]}))
    tar = folder / "a.tar"
    write_tar(tar, name, name, text)
    tars = folder / "tars"
    tars.mkdir()
    write_tar(tars / "0.tar", "a", f"dog {spoken}", text)
    failed = {"url": [f"http://{spoken}/x"], "status": [storable], "error_message": [storable]}
    pq.write_table(pa.table(failed), tars / "0.parquet")
    picture = folder / "a.png"
    factories.draw_picture(0).save(picture)
    return [
        ("stats", run.path), ("verify", run.path, "--deep"), ("run", recipe, run.path, "--dry-run"),
        ("caption", run.path, "--captioner", models / "captioner"), ("caption", run.path, "--captioner", odd_model),
        ("import", tar, folder / "imported"), ("evaluate", "filter", run.path, "--labels", labels),
        ("evaluate", "filter", run.path, "--labels", json_labels),
        ("select", folder / "whole", "--threshold", "0.5", "--sources", name),
        ("explain", models / "filter", picture, f"dog {spoken}", "--output", folder / "e.png"),
        ("retry", run.path, "--reason", name), (name,), ("stats", run.path, f"--{name}"),
        ("stats", folder / name), ("run", name, run.path), ("caption", run.path, "--captioner", name),
        ("import", folder / f"{name}.tar", folder / "other"), ("download", folder / f"{name}.csv", folder / "third"),
        ("generate", name, picture), ("generate", models / "captioner", folder / name),
        ("train", "blip", run.path, "--output", folder / "blip", "--set", f"{name}=1"),
        ("recipe", "check", recipe), ("recipe", "check", wrong), ("run", wrong, run.path), ("recipe", "show", recipe),
        ("recipe", "show", recipe, "--json"), ("recipe", "show", name),
        ("show", run.path, "--limit", "1"), ("show", run.path, "--key", name), ("show", run.path, "--reason", name),
        ("show", run.path, "--where", name), ("show", run.path, "--where", f"{name} = 1"),
        ("stats", run.path, "--section", "all"), ("stats", run.path, "--section", name),
        ("stats", run.path, "--compare", folder / "whole"), ("stats", tars), ("stats", tars, "--section", "all"),
        ("stats", folder / "whole", "--generation", name), ("export", folder / "whole", "--format", name),
    ]  # fmt: skip


@pytest.mark.parametrize("trick", list(TRICKS) if FULL else list(TRICKS)[1::4])
def test_every_field_that_is_printed(
    tmp_path: Path, models: Path, harmless: list[str], trick: str, figure: Figure
) -> None:
    commands = commands_with(TRICKS[trick], tmp_path, models)
    for command, expected in zip(commands, harmless, strict=True):
        shown = printed(command)
        assert shown
        assert not UNSAFE.search(shown), (command, shown)
        assert num_lines(shown) == num_lines(expected), (command, shown)
    figure(15, f"{len(TRICKS)} tricks in {len(commands)} commands: only safe characters printed, and no line more")


def num_lines(shown: str) -> int:
    """Lines, but for those of progress, which depend on the time that it takes."""
    return sum(not re.search(r"^\w+ .*\d%", line) for line in shown.split("\n"))


def printed(command: tuple[object, ...]) -> str:
    """All that a command writes to the terminal, the message of an error included."""
    words = [str(word) for word in command]
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(out),
        patch.object(sys, "argv", ["capfilt", *words]),
    ):
        done = CliRunner().invoke(app, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            report(done.exception)
    return done.output + out.getvalue()


def write_tar(path: Path, name: str, caption: str, text: str) -> None:
    buffer = io.BytesIO()
    factories.draw_picture(1).save(buffer, "PNG")
    with tarfile.open(path, "w") as tar:
        metadata = json.dumps({"caption": text, "url": text})
        members = {"png": buffer.getvalue(), "txt": caption.encode(), "json": metadata.encode()}
        for member, content in ((f"{name}.{ending}", content) for ending, content in members.items()):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
