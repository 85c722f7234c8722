"""`capfilt show` as a person meets it: in pseudo-terminals, by its keys; and as a script does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import termios
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

from capfilt.data.commit import read_table
from capfilt.data.images import decode_image
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_sample
from capfilt.report.gradcam import overlay
from capfilt.world.language import full_caption
from capfilt.world.scenes import draw_scene, render
from tests.cli.conftest import capfilt
from tests.curation.small_runs import make_run
from tests.data import conftest as small
from tests.factories import draw_picture
from tests.hostile_texts import TRICKS, UNSAFE, run_with_texts
from tests.report.terminals import (
    Session,
    block_picture,
    clean_environment,
    difference,
    iterm2_pictures,
    kitty_pictures,
    sixel_pictures,
)

READY = r"\? help"
KITTY_ANSWER, XTERM_ANSWER = "\x1bP>|xterm(390)\x1b\\\x1b[6;20;10t\x1b[?64;1;2;6;22c", "\x1b[?63;1;2;4;6;9;15;22c"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two shards with every stage."""
    run = RunDir.create(tmp_path_factory.mktemp("show") / "run")
    small.commit_all(run, 2, 5)
    return Path(str(run.path))


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that look alike at any resolution, and no captions yet; the second cannot be decoded."""
    path = tmp_path_factory.mktemp("soft") / "run"
    make_run(path, num_shards=1, num_samples=3, broken=[1], picture_size_px=(120, 100))
    return path


def answers(text: str) -> str:
    """As a terminal without pictures answers the question what it is."""
    return "\x1b[?64;1;2;6;22c" if "\x1b[c" in text else ""


def key_on_screen(session: Session) -> str:
    return session.screen().display[0].split()[0]


def test_keys_turn_the_pages_and_the_terminal_is_as_it_was(run: Path) -> None:
    with Session("show", run, answer=answers) as session:
        session.wait_for(READY)
        assert key_on_screen(session) == "000000000"
        assert termios.tcgetattr(session.slave) != session.before
        for keys, expected in (
            ("n", "000000001"), (" ", "000000002"), ("\x1b[C", "000000003"), ("p", "000000002"),
            ("\x1b[D", "000000001"), ("\x1bOC", "000000002"), ("G", "000010004"), ("g", "000000000"),
            ("\x1b[F", "000010004"), ("nn", "000010004"),
        ):  # fmt: skip
            session.press(keys)
            session.wait_for(READY if keys != "nn" else "last one.*last one")
            assert key_on_screen(session) == expected, keys
        session.press("gp")
        session.wait_for("first one")
        session.press("?")
        session.wait_for("any key goes back")
        assert any("n, space" in line for line in session.screen().display)
        session.press("x")
        session.wait_for(READY)
        session.press("e")
        session.wait_for("--explain MODEL")
        session.press("q")
        assert session.end() == 0
        assert termios.tcgetattr(session.slave) == session.before
        assert session.text.rstrip().endswith("\x1b[0m\x1b[?25h\x1b[?1049l")


@pytest.mark.parametrize(
    ("ending", "code"),
    [("\x03", 130), (signal.SIGINT, 130), (signal.SIGTERM, 143), ("\x04", 0), ("damage", 5), ("q", 0)],
)
def test_however_it_ends_the_terminal_is_given_back(run: Path, tmp_path: Path, ending: str | int, code: int) -> None:
    if ending == "damage":
        other = RunDir.create(tmp_path / "run")
        small.commit_all(other, 1, 3)
        tar = other.path / "shards" / "00000.tar"
        row = read_table(other.stage_file("shards", "00000")).to_pylist()[1]
        content = bytearray(tar.read_bytes())
        content[row["image_offset"] + 5] ^= 1
        tar.write_bytes(content)
        run = Path(str(other.path))
    with Session("show", run, answer=answers) as session:
        session.wait_for(READY)
        if isinstance(ending, int):
            session.process.send_signal(ending)
        else:
            session.press("n" if ending == "damage" else ending)
        assert session.end() == code, session.text[-500:]
        assert termios.tcgetattr(session.slave) == session.before
        assert "\x1b[?25h\x1b[?1049l" in session.text
        assert session.left_for_the_shell() == b""
        if ending == "damage":
            assert "00000.tar" in session.text.partition("\x1b[?1049l")[2]


def test_a_terminal_that_goes_away_ends_it(run: Path) -> None:
    session = Session("show", run, answer=answers)
    session.wait_for(READY)
    os.close(session.slave)
    os.close(session.master)
    assert session.process.wait(30) is not None


def test_a_terminal_that_does_not_answer_is_not_waited_for(run: Path) -> None:
    with Session("show", run) as session:
        session.wait_for(READY)
        assert "\x1b[>q\x1b[16t\x1b[c" in session.text
        session.press("n")
        session.wait_for(READY)
        os.write(session.master, KITTY_ANSWER.encode())  # far too late
        session.press("n")
        session.wait_for(READY)
        assert key_on_screen(session) == "000000002", "an answer is no key"
        os.write(session.master, KITTY_ANSWER.encode())
        session.press("q")
        assert session.end() == 0
        assert session.left_for_the_shell() == b""


def test_what_was_typed_before_the_answer_is_not_lost(run: Path) -> None:
    with Session("show", run, answer=lambda text: "n\x1b[?64;1;2c" + "n" if "\x1b[c" in text else "") as session:
        session.wait_for("000000002")
        session.press("q")
        assert session.end() == 0


def test_the_window_may_change(run: Path) -> None:
    with Session("show", run, answer=answers, columns=100) as session:
        session.wait_for(READY)
        session.resize(40, 20)
        session.wait_for(READY)
        assert all(cell_len(line.rstrip()) <= 40 for line in session.screen().display)
        session.press("j")
        session.wait_for("more lines|help")
        session.press("q")
        assert session.end() == 0


def sample_picture(run: Path, key: str) -> object:
    return decode_image(read_sample(RunDir.open(run), "00000", key).image)


@pytest.mark.parametrize(
    ("term", "environment", "answer", "decode"),
    [
        ("xterm-kitty", {}, None, lambda text: [picture for _, picture in kitty_pictures(text)]),
        ("xterm", {"TERM_PROGRAM": "iTerm.app"}, None, lambda text: [picture for _, picture in iterm2_pictures(text)]),
        ("xterm", {}, XTERM_ANSWER, sixel_pictures),
        ("xterm", {}, "\x1bP>|kitty(0.40.0)\x1b\\\x1b[?62;c", lambda text: [p for _, p in kitty_pictures(text)]),
        ("xterm", {}, "\x1bP>|WezTerm 20240203\x1b\\\x1b[?65;4c", lambda text: [p for _, p in iterm2_pictures(text)]),
    ],
)
def test_the_best_way_of_a_terminal(
    soft: Path, term: str, environment: dict[str, str], answer: str | None, decode: object
) -> None:
    said = (lambda text: answer if "\x1b[c" in text else "") if answer else None
    with Session("show", soft, term=term, cell=(10, 20), answer=said, **environment) as session:
        session.wait_for(READY)
        (seen,) = decode(session.text)  # type: ignore[operator]
        assert difference(seen, draw_picture(0, width_px=120, height_px=100)) < 12
        assert ("\x1b[c" in session.text) == bool(answer), "asked only where the environment does not say"
        session.press("n")
        assert "The picture cannot be shown" in session.wait_for(READY)
        session.press("n")
        session.wait_for(READY)
        assert difference(decode(session.text)[1], draw_picture(2, width_px=120, height_px=100)) < 12  # type: ignore[operator]
        session.press("q")
        assert session.end() == 0
        assert session.left_for_the_shell() == b""


def test_half_blocks_where_there_is_nothing_better(soft: Path) -> None:
    with Session("show", soft, rows=30, answer=answers, COLORTERM="truecolor") as session:
        session.wait_for(READY)
        screen = session.screen()
        rows = [y for y in range(30) if screen.buffer[y][0].data == "▀"]
        width = sum(screen.buffer[rows[0]][x].data == "▀" for x in range(80))
        seen = block_picture(screen, rows[0], 0, width, len(rows))
        assert len(rows) >= 13
        assert difference(seen, draw_picture(0, width_px=120, height_px=100)) < 5
        session.press("q")
        assert session.end() == 0


@pytest.mark.parametrize(
    ("term", "environment"), [("dumb", {}), ("xterm", {"NO_COLOR": "1"}), ("dumb", {"NO_COLOR": "1"})]
)
def test_without_colour(run: Path, term: str, environment: dict[str, str]) -> None:
    with Session("show", run, "--limit", 2, term=term, answer=answers, **environment) as session:
        if term != "dumb":
            session.wait_for(READY)
            session.press("q")
        assert session.end() == 0
        assert not re.search(r"\x1b\[[0-9;]*[1-9][0-9;]*m", session.text)
        assert "▀" not in session.text
        assert ("\x1b" in session.text) == (term != "dumb")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_lines_fit(columns: int, tmp_path: Path) -> None:
    texts = ["a dog " * 90, "日本語のとても長い説明文です" * 12, "x" * 300, "ok", "https://example.com/" + "y" * 150]
    run = run_with_texts(tmp_path / "run", texts)
    with Session("show", run.path, columns=columns, rows=50, answer=answers, COLORTERM="truecolor") as session:
        for key in ("", "n", "n", "n"):
            session.press(key)
            session.wait_for(READY)
            lines = re.split(r"\x1b\[\d+;1H|\r?\n", session.text.rpartition("\x1b[2J")[2])
            shown = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[78]", "", line) for line in lines]
            assert max(map(cell_len, shown)) <= columns
        session.press("q")
        assert session.end() == 0
    done = subprocess.run(
        [sys.executable, "-m", "capfilt", "show", str(run.path)], capture_output=True, text=True, check=True,
        env=clean_environment(TERM="xterm"),
    )  # fmt: skip
    assert "\x1b" not in done.stdout
    assert "日本語" in done.stdout


def test_hostile_texts_do_nothing(tmp_path: Path) -> None:
    run = run_with_texts(tmp_path / "run", list(TRICKS.values()))
    done = capfilt("show", run.path)
    assert done.code == 0, done.err
    assert not UNSAFE.search(done.out)
    for trick in list(TRICKS.values())[::5]:
        asked = ("--key", trick), ("--where", f"text = {trick}"), ("--reason", trick), ("--source", trick)
        for option in asked:
            refused = capfilt("show", run.path, *option)
            assert refused.code == 2
    with Session("show", run.path, answer=answers) as session:
        for _ in range(4):
            session.wait_for(READY)
            session.press("n")
        session.press("q")
        assert session.end() == 0
        assert not re.search(r"\x1b\](?!1337)|\x1bP(?!>)|\x9b|\x07|[\u202e\u2066\u200b]", session.text)


def test_one_sample_stays_on_the_screen(run: Path) -> None:
    with Session("show", run, "--key", "000000002", answer=answers, COLORTERM="truecolor") as session:
        assert session.end() == 0
        assert "\x1b[?1049h" not in session.text
        assert "▀" in session.text
        assert termios.tcgetattr(session.slave) == session.before


def test_a_script_gets_lines_or_json(run: Path) -> None:
    done = capfilt("show", run)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines() if "of 5 in the shard" in line] == [
        f"0000{shard}000{number}" for shard in range(2) for number in range(5)
    ]
    assert "low_clip: The CLIP score is not among the best of its image." in done.out
    done = capfilt("show", run, "--where", "rank = 1", "--limit", 3, "--json")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [sample["key"] for sample in found] == ["000000000", "000000001", "000000002"]
    assert all(sample["captions"][1]["matches"] for sample in found)
    failed = capfilt("show", run, "--reason", "timeout")
    assert failed.out.count("failed_to_download: timeout. The exchange did not end") == 2
    nothing = capfilt("show", run, "--source", "human")
    assert (nothing.code, nothing.out) == (0, "")
    assert "No sample" in nothing.err
    again = [capfilt("show", run, "--random", 3, "--seed", 7).out for _ in range(2)]
    assert again[0] == again[1] != ""


@pytest.mark.parametrize(
    "options",
    [
        ("--json", "--pictures", "kitty"), ("--caption", 0), ("--seed", 3), ("--pictures", "ascii"),
        ("--where", "nope = 1"), ("--reason", "nope"), ("--random", 1, "--limit", 1), ("--key", "nope"),
        ("--generation", "nope"), ("--random", 0), ("--json", "--explain", "embedded"), ("--device", "cpu"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(run: Path, options: tuple[object, ...]) -> None:
    done = capfilt("show", run, *options)
    assert (done.code, done.out) == (2, "")


def test_a_pipe_gets_pictures_when_they_are_asked_for(soft: Path) -> None:
    for protocol, decode in (
        ("kitty", lambda text: kitty_pictures(text)[0][1]), ("sixel", lambda text: sixel_pictures(text)[0]),
        ("iterm2", lambda text: iterm2_pictures(text)[0][1]),
    ):  # fmt: skip
        done = capfilt("show", soft, "--limit", 1, "--pictures", protocol)
        assert difference(decode(done.out), draw_picture(0, width_px=120, height_px=100)) < 12
    assert "▀" in capfilt("show", soft, "--limit", 1, "--pictures", "blocks").out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the world with people's captions, which the embedded models understand."""
    folder = tmp_path_factory.mktemp("world")
    scenes = [draw_scene(number, "test") for number in range(3)]
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, scene in enumerate(scenes):
            Image.fromarray(render(scene, 200, 120)).save(folder / f"{number}.png")
            (folder / f"{number}.json").write_text(
                json.dumps({"captions": [full_caption(scene, np.random.default_rng(0)), "a red ball", "..."]})
            )
            for name in (f"{number}.png", f"{number}.json"):
                tar.add(folder / name, name)
    done = capfilt("import", folder / "a.tar", folder / "run", "--human")
    assert done.code == 0, done.err
    return folder / "run"


def test_a_caption_is_explained(world: Path, tmp_path: Path) -> None:
    sample = json.loads(capfilt("show", world, "--limit", 1, "--json").out)
    picture = decode_image(read_sample(RunDir.open(world), "00000", sample["key"]).image)
    picture.save(tmp_path / "a.png")
    for options, text in (((), sample["captions"][0]["text"]), (("--caption", 1), "a red ball")):
        done = capfilt(
            "show", world, "--limit", 1, "--pictures", "kitty", "--explain", "embedded", "--device", "cpu", *options
        )
        assert done.code == 0, done.err
        alone = capfilt("explain", "embedded", tmp_path / "a.png", text, "--output", tmp_path / "e.png", "--json")
        (known,) = alone.json()["texts"]
        assert f"match probability {known['probability']:.3f}: {text}" in done.out
        strongest = max(known["words"], key=lambda word: word["share"])
        assert f"strongest words: {strongest['word']} {strongest['share']:.0%}" in done.out
        ((_, joined),) = kitty_pictures(done.out)
        left, right = joined.crop((0, 0, 200, 120)), joined.crop((joined.width - 200, 0, joined.width, 120))
        drawn = Image.fromarray(overlay(picture, np.array(known["average"])))
        assert difference(left, picture) == 0
        assert difference(right, drawn) < 2 < difference(right, picture)
    without_words = capfilt("show", world, "--limit", 1, "--explain", "embedded", "--caption", 2)
    assert without_words.code == 0
    assert "holds no words" in without_words.out
    nothing = capfilt("show", world, "--limit", 1, "--explain", "embedded", "--caption", 7)
    assert "There is no such caption" in nothing.out
    assert capfilt("show", world, "--explain", world).code == 2


def test_explanations_come_and_go(world: Path) -> None:
    with Session("show", world, "--explain", "embedded", "--device", "cpu", rows=40, answer=answers) as session:
        assert "strongest words" in session.wait_for(READY)
        session.press("j")
        assert "Explaining" not in session.wait_for(READY), "it is explained once"
        session.press("e")
        assert "strongest words" not in session.wait_for(READY)
        session.press("n")
        assert "strongest words" not in session.wait_for(READY)
        session.press("e")
        assert "strongest words" in session.wait_for(READY)
        session.press("q")
        assert session.end() == 0
        assert termios.tcgetattr(session.slave) == session.before


def test_a_run_on_an_object_store(address: str, soft: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        picture = tmp_path / "a.png"
        draw_picture(4, width_px=120, height_px=100).save(picture)
        (tmp_path / "a.txt").write_text("a red dog")
        tar.add(picture, "a.png")
        tar.add(tmp_path / "a.txt", "a.txt")
    assert capfilt("import", tmp_path / "a.tar", address).code == 0
    done = capfilt("show", address, "--pictures", "kitty")
    assert done.code == 0, done.err
    assert "a red dog" in done.out
    assert difference(kitty_pictures(done.out)[0][1], draw_picture(4, width_px=120, height_px=100)) < 3
