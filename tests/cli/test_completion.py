"""What Tab offers, asked as shells ask it, in a process of its own; and that nothing heavy is imported for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from capfilt.cli.sharing import FILES
from capfilt.cli.statistics import ALL
from capfilt.recipes import bundled_recipes
from capfilt.report.stats_view import SECTIONS
from capfilt.settings.checks import DECODINGS, DEVICES
from capfilt.settings.export import FOLDER_FORMATS

BIN = Path(sys.executable).parent
ASK = """\
import sys
from capfilt.__main__ import main
sys.argv = ["capfilt"]
try:
    main()
finally:
    sys.stderr.write(" ".join(sorted({"torch", "pyarrow", "transformers", "numpy"} & set(sys.modules))))
"""


def complete(line: str, shell: str = "bash", **environment: str) -> list[str]:
    """The answers of the protocol for a line whose last word is not ended."""
    words = line.split(" ")
    given = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    given |= {"_TYPER_COMPLETE_ARGS": line} | environment
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, check=False,
        env={**os.environ, **given, "_CAPFILT_COMPLETE": f"complete_{shell}"},
    )  # fmt: skip
    assert done.stderr == "", "imported while completing"
    return [line for line in done.stdout.split("\n") if line]


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("capfilt ca", ["caption"]),
        ("capfilt re", ["retry", "report", "recipe"]),
        ("capfilt train st", ["stage1", "stage2"]),
        ("capfilt recipe ", ["list", "show", "new", "check", "schema"]),
        ("capfilt filter runs/x --thr", ["--threshold"]),
        ("capfilt train stage1 x --image-enc", ["--image-encoder", "--image-encoder-layer"]),
        ("capfilt run q", ["quickstart"]),
        ("capfilt run ", sorted(bundled_recipes())),
        ("capfilt recipe show world-stage2", ["world-stage2-alone", "world-stage2-opt", "world-stage2-t5"]),
        ("capfilt recipe check blip b", ["blip", "blip2"]),
        ("capfilt recipe new mine.toml --from cap", ["capfilt", "capfilt-100m"]),
        ("capfilt caption runs/x --decoding ", list(DECODINGS)),
        ("capfilt caption runs/x --device ", list(DEVICES)),
        ("capfilt train stage1 x --autocast b", ["bfloat16"]),
        ("capfilt stats runs/x --engine ", ["local", "ray"]),
        ("capfilt evaluate retrieval m --resizer ", ["torchvision", "pillow"]),
        ("capfilt select runs/x --sources s", ["synthetic"]),
        ("capfilt retry runs/x --reason time", ["timeout"]),
        ("capfilt show runs/x --reason low", ["low_itm", "low_clip"]),
        ("capfilt show runs/x --pictures s", ["sixel"]),
        ("capfilt export runs/x --format ", [*FILES.values(), *FOLDER_FORMATS]),
        ("capfilt train stage1 x --set opt", ["optimizer="]),
        ("capfilt train captioner x --set known", []),  # a setting that it does not ask
        ("capfilt caption runs/", []),  # files: the shell's own
        ("capfilt run mine", []),
    ],
)
def test_bash_is_offered_names(line: str, answers: list[str]) -> None:
    assert sorted(complete(line)) == sorted(answers)


@pytest.mark.parametrize("line", ["stats {run} --generation ", "train blip {run} --generation ", "show --generation "])
def test_generations_of_the_run_are_offered(line: str, tmp_path: Path) -> None:
    for folder in ("shards", "itm@strict", "manifest@strict", "captions@other"):
        (tmp_path / folder).mkdir()
    offered = complete("capfilt " + line.format(run=tmp_path))
    assert offered == (["other", "strict"] if "{run}" in line else [])


def test_every_section_is_offered() -> None:
    assert complete("capfilt stats x --section ") == [*SECTIONS, ALL]


def test_zsh_and_fish_are_told_what_a_recipe_does() -> None:
    (zsh,) = complete("capfilt run quickst", "zsh")
    assert zsh.startswith('_arguments \'*: :(("quickstart":"Quick start')
    (fish,) = complete("capfilt run quickst", "fish", _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert fish.startswith("quickstart\tQuick start")


@pytest.mark.parametrize(
    "line", ["capfilt run ", "capfilt caption x --", "capfilt ", "capfilt recipe ", "capfilt retry x --reason "]
)
def test_every_answer_is_one_line(line: str) -> None:
    """fish takes each line for an answer, with its text behind a tab."""
    answers = complete(line, "fish", _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert len(answers) > 4
    assert [answer for answer in answers if answer.count("\t") != 1] == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(("words", "answers"), [("capfilt capt", "caption"), ("capfilt run quic", "quickstart")])
def test_bash_itself_with_the_script_that_is_shown(words: str, answers: str) -> None:
    script = f"""eval "$(capfilt --show-completion)"
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$(complete -p capfilt | sed 's/.*-F \\([^ ]*\\).*/\\1/') capfilt
echo "${{COMPREPLY[@]}}"
"""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == (f"{answers}\n", "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_it_installs_for_bash(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    subprocess.run(
        ["bash", "-c", "capfilt --install-completion; true"], capture_output=True, check=True, env=environment
    )
    check = f"source {tmp_path}/.bashrc; complete -p capfilt"
    done = subprocess.run(["bash", "-c", check], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("complete -o default -F _capfilt")
