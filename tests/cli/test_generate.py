"""`capfilt generate` from images on disk to texts, with small random models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from capfilt.data.image_sources import ImageFile
from capfilt.data.images import decode_image
from capfilt.train.generate import load_generator
from tests import factories
from tests.cli.conftest import capfilt
from tests.evaluate.small_blip2 import save_blip2

NUM_PICTURES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `opt`, `t5`, `captioner`; pictures/0.png to 4.png; broken.png."""
    folder = tmp_path_factory.mktemp("generate")
    for family in ("opt", "t5"):
        save_blip2(folder / family, family)
    factories.save_captioner(folder / "captioner")
    (folder / "pictures").mkdir()
    for number in range(NUM_PICTURES):
        factories.draw_picture(number).save(folder / "pictures" / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "pictures" / "0.png").read_bytes()[:200])
    return folder


def expected(folder: Path, model: str, prompt: str = "", **options: object) -> list[str]:
    """What the generator writes of all pictures together."""
    generator = load_generator(folder / model, "cpu")
    pictures = [decode_image((folder / "pictures" / f"{n}.png").read_bytes()) for n in range(NUM_PICTURES)]
    return generator.generate(pictures, [prompt] * NUM_PICTURES, **options)  # type: ignore[arg-type]


def texts(out: str) -> list[str]:
    return [line.split("\t")[-1] for line in out.splitlines()]


def test_one_picture_prints_its_text_alone_and_several_their_names(folder: Path) -> None:
    pictures = folder / "pictures"
    whole = expected(folder, "opt")
    one = capfilt("generate", folder / "opt", pictures / "0.png", "--device", "cpu")
    assert (one.code, one.out) == (0, whole[0] + "\n")
    by_folder = capfilt("generate", folder / "opt", pictures, "--device", "cpu", "--batch-size", 2)
    assert by_folder.out.splitlines() == [f"{pictures}/{n}.png\t{text}" for n, text in enumerate(whole)]
    by_pattern = capfilt("generate", folder / "opt", pictures / "*.png", "--device", "cpu")
    assert by_pattern.out == by_folder.out


@pytest.mark.parametrize("model", ["opt", "t5"])
def test_options_reach_the_model(folder: Path, model: str) -> None:
    command = ("generate", folder / model, folder / "pictures", "--device", "cpu")
    searched = capfilt(*command, "--num-beams", 3, "--max-new-tokens", 6, "--min-new-tokens", 4, "--length-penalty", 2)
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 4, "length_penalty": 2.0}
    assert texts(searched.out) == expected(folder, model, **options)
    assert texts(capfilt(*command, "--prompt", "a red").out) == expected(folder, model, "a red")
    generator = load_generator(folder / model, "cpu")
    frame = generator.stage.llm.question_prompt.format("what color")
    answers = expected(folder, model, frame, num_beams=5, max_new_tokens=10, length_penalty=-1.0)
    for asked in (("--question", "what color"), ("--prompt", "what color", "--answer")):
        assert texts(capfilt(*command, *asked).out) == answers
    drawn = [capfilt(*command, "--top-p", 0.95, "--temperature", 1.5, "--seed", seed).out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_files_of_prompts(folder: Path, tmp_path: Path) -> None:
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("a red\nwhat color\n")
    command = ("generate", folder / "opt", "--device", "cpu", "--jsonl", "--prompts")
    done = capfilt(*command, plain, folder / "pictures")
    rows = [json.loads(line) for line in done.out.splitlines()]
    first, second = expected(folder, "opt", "a red"), expected(folder, "opt", "what color")
    assert [row["text"] for row in rows] == [text for pair in zip(first, second, strict=True) for text in pair]
    assert [row["prompt"] for row in rows] == ["a red", "what color"] * NUM_PICTURES
    entries = [{"image": str(folder / "pictures" / f"{n}.png"), "prompt": "a red"} for n in (3, 1)]
    lines.write_text("\n".join(map(json.dumps, entries)))
    assert [json.loads(line)["text"] for line in capfilt(*command, lines).out.splitlines()] == [first[3], first[1]]
    named = capfilt("generate", folder / "opt", "--prompts", plain, folder / "pictures" / "0.png")
    assert named.out.splitlines() == [f"a red\t{first[0]}", f"what color\t{second[0]}"]


def test_an_unreadable_image_does_not_end_the_run(folder: Path) -> None:
    names = [folder / "pictures" / "0.png", folder / "broken.png", folder / "none.png", folder / "pictures" / "1.png"]
    whole = expected(folder, "opt")
    plain = capfilt("generate", folder / "opt", *names)
    assert plain.code == 1
    assert texts(plain.out) == whole[:2]
    assert "broken.png cannot be used: truncated_image" in plain.err
    assert "none.png cannot be used: not readable: No such file" in plain.err
    assert "2 of 4 texts could not be written" in plain.err
    for option, read in (
        ("--jsonl", lambda out: [json.loads(line) for line in out.splitlines()]),
        ("--json", json.loads),
    ):
        done = capfilt("generate", folder / "opt", *names, option)
        rows = read(done.out)
        assert done.code == 1
        assert [row["text"] for row in rows] == [whole[0], None, None, whole[1]]
        assert [row["image"] for row in rows] == list(map(str, names))
        assert ["error" in row for row in rows] == [False, True, True, False]


def test_a_captioner_writes_too(folder: Path) -> None:
    captioner = folder / "captioner"
    described = capfilt("generate", captioner, folder / "pictures", "--dtype", "float32")
    assert described.code == 0, described.err
    assert len(set(texts(described.out))) > 2
    searched = capfilt("generate", captioner, folder / "pictures", "--num-beams", 3, "--dtype", "float32")
    assert searched.out != described.out
    drawn = [capfilt("generate", captioner, folder / "pictures", "--top-p", 0.9, "--seed", s).out for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    asked = capfilt("generate", captioner, folder / "pictures" / "0.png", "--question", "what is it")
    assert (asked.code, asked.out) == (2, "")
    assert "answers no questions" in asked.err


def test_what_was_written_before_an_interruption_is_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [folder / "pictures" / f"{n}.png" for n in range(NUM_PICTURES)]
    read = ImageFile.read

    def interrupted(image: ImageFile) -> bytes:
        if image.path == names[3]:
            raise KeyboardInterrupt
        return read(image)

    monkeypatch.setattr(ImageFile, "read", interrupted)
    done = capfilt("generate", folder / "opt", *names, "--batch-size", 1, "--device", "cpu")
    assert done.code == 130
    assert texts(done.out) == expected(folder, "opt")[:3]


def test_a_name_that_is_no_text(folder: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write((folder / "pictures" / "0.png").read_bytes())
    for model in ("opt", "captioner"):
        done = capfilt("generate", folder / model, tmp_path, "--jsonl")
        assert done.code == 0, done.err
        assert json.loads(done.out)["text"]


def test_wrong_usage(folder: Path, tmp_path: Path) -> None:
    picture, opt = folder / "pictures" / "0.png", folder / "opt"
    (tmp_path / "lines.jsonl").write_text(json.dumps({"image": str(picture), "prompt": "a"}))
    for arguments, said in (
        ((opt,), "No image is named"),
        ((opt, folder / "none.png"), "is not there"),
        ((opt, picture, "--answer"), "--answer needs a question"),
        ((opt, picture, "--prompt", "a", "--question", "b"), "Give one of --prompt, --prompts and --question"),
        ((opt, picture, "--prompts", tmp_path / "lines.jsonl"), "names its images itself"),
        ((opt, picture, "--top-p", 1.5), "top_p is 1.5; expected more than 0, at most 1"),
        ((opt, picture, "--dtype", "int8"), "dtype is 'int8'"),
        ((folder / "opt-parts" / "blip", picture), "expected Blip2ForConditionalGeneration or BlipFor"),
        ((folder / "nothing", picture), "no model"),
    ):
        done = capfilt("generate", *arguments)
        assert done.code == 2, (arguments, done)
        assert said in done.err, (arguments, done)
