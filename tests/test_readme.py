"""The README's commands: each is one that its parser takes, and what needs no models or machines of one's own runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_reference import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def commands_of(block: str) -> list[list[str]]:
    """Its lines as words, without what stands behind a #; folded lines are one."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


BLOCKS = [
    commands_of(text) for kind, text in BLOCK.findall(README)
    if not kind and re.search(r"^(capfilt|torchrun|make|ray) ", text, flags=re.MULTILINE)
]  # fmt: skip
COMMANDS = [words for block in BLOCKS for words in block]
OURS = [words[1:] for words in COMMANDS if words[0] == "capfilt"]
OURS += [words[words.index("capfilt") + 1 :] for words in COMMANDS if words[0] == "torchrun"]
NOT_HERE = {"ray", "export", "git", "cd", "make", "torchrun"}
"""First words of commands that are not ours."""


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_is_taken_by_its_parser(words: list[str]) -> None:
    parse(list(words))


def test_the_blocks_are_found() -> None:
    assert len(OURS) > 25
    found = {words[0] for words in COMMANDS if words[0] != "capfilt"} - set(NOT_HERE)
    assert {word for word in found if "/" not in word} == set()


def run_here(folder: Path, *blocks: list[list[str]]) -> None:
    for words in (words for block in blocks for words in block):
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"


def blocks_about(run: str) -> list[list[list[str]]]:
    """Those all of whose commands are ours and name that run, or are the one that makes it."""
    about = [block for block in BLOCKS if block and all(words[0] == "capfilt" for words in block)]
    return [block for block in about if all(run in words or words[1:] == ["run", "quickstart"] for words in block)]


@pytest.mark.slow
def test_what_the_quick_start_says_runs_as_it_stands(tmp_path: Path) -> None:
    """In the order of the README: the run, its figures, both trainings, samples, exports."""
    blocks = blocks_about("runs/quickstart")
    assert len(blocks) == 3
    assert [words[1] for block in blocks for words in block].count("show") == 6
    run_here(tmp_path, *blocks)
    run = tmp_path / "runs" / "quickstart"
    made = [run / "stage2" / "model.safetensors", run / "curated" / "00000.tar", tmp_path / "hf" / "README.md"]
    assert [path for path in made if not path.exists()] == []


def test_the_sql_of_the_readme_runs(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    from tests.train.small_models import save_run

    save_run(tmp_path / "run", [5])
    [sql] = [text for kind, text in BLOCK.findall(README) if kind == "sql"]
    rows = duckdb.sql(sql.replace("runs/mine", str(tmp_path / "run"))).fetchall()
    assert rows
    assert len(rows[0]) == 3


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded models, as the README says, and a picture."""
    from tests import factories

    [text] = [text for kind, text in BLOCK.findall(README) if kind == "python"]
    code, num = re.subn(r'"(Salesforce/[\w-]+|ViT-L-14)"', '"embedded"', text)
    assert num == 3
    factories.draw_photograph(0).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert [len(own) for own in found["captions"]] == [10]  # type: ignore[attr-defined]
    assert found["table"].num_rows > 100  # type: ignore[attr-defined]
    assert len(found["data"]) > 100  # type: ignore[arg-type]


def test_files_that_are_linked_are_there() -> None:
    linked = re.findall(r"\]\((?!http|#)([^)#]+)\)", README)
    assert "docs/stats.svg" in linked
    assert [name for name in linked if not (ROOT / name).exists()] == []
    titles = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
