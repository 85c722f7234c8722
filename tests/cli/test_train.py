"""Training and generating through the command line, with small random models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.cli.conftest import capfilt
from tests.train import small_models

STEPS = ("--max-steps", 2, "--batch-size", 4, "--warmup-steps", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN with twelve samples, and the models that training starts from."""
    folder = tmp_path_factory.mktemp("training")
    small_models.save_run(folder / "run", [12])
    small_models.save_blip(folder / "blip")
    small_models.save_blip(folder / "captioner", captioner=True)
    small_models.save_opt(folder / "opt")
    Image.fromarray(small_models.draw_square("red", "left", seed=1)).save(folder / "red.png")
    (folder / "text.png").write_text("no picture")
    return folder


def test_both_stages_and_what_they_write(folder: Path) -> None:
    run, stage1, stage2 = folder / "run", folder / "stage1", folder / "stage2"
    first = ("train", "stage1", run, "--output", stage1, "--image-encoder", folder / "blip", *STEPS)
    done = capfilt(*first)
    assert done.code == 0, done.err
    assert "stage 1: 2 steps, loss" in done.out
    assert "Next: capfilt train stage2" in done.err
    assert "nothing to do, 2 steps are done" in capfilt(*first).out

    done = capfilt("train", "stage2", run, "--init", stage1, "--llm", folder / "opt", "--output", stage2, *STEPS)
    assert done.code == 0, done.err
    assert f"Next: capfilt generate {stage2} IMAGE" in done.err

    one = capfilt("generate", stage2, folder / "red.png", "--max-new-tokens", 5)
    assert one.code == 0, one.err
    two = capfilt("generate", stage2, folder / "red.png", folder / "red.png", "--max-new-tokens", 5, "--json").json()
    assert [entry["text"] for entry in two] == [one.out.rstrip("\n")] * 2
    asked = capfilt("generate", stage2, folder / "red.png", "--prompt", "what color is the square", "--answer")
    assert asked.code == 0, asked.err


@pytest.mark.parametrize("method", ["generate", "answer"])
def test_generate_passes_on_what_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    asked: list[dict[str, int]] = []

    def write(_pictures: object, _prompts: object, **options: int) -> list[str]:
        asked.append(options)
        return ["red"]

    monkeypatch.setattr("capfilt.train.generate.load_generator", lambda *_: SimpleNamespace(**{method: write}))
    command = ("generate", "model", folder / "red.png", "--prompt", "which?")
    command += ("--answer",) if method == "answer" else ()
    for extra in ((), ("--num-beams", 2, "--max-new-tokens", 3)):
        assert capfilt(*command, *extra).out == "red\n"
    assert asked == [{}, {"num_beams": 2, "max_new_tokens": 3}]


@pytest.mark.parametrize("part", ["captioner", "filter"])
def test_fine_tuning(folder: Path, part: str) -> None:
    init = folder / ("captioner" if part == "captioner" else "blip")
    done = capfilt(
        "train", part, folder / "run", "--init", init, "--output", folder / f"tuned-{part}", *STEPS, "--json"
    )
    assert done.code == 0, done.err
    assert done.json()["steps"] == 2
    assert (folder / f"tuned-{part}" / "config.json").exists()


@pytest.mark.parametrize("training", ["blip", "captioner", "filter", "stage1", "stage2", "clip", "llm"])
def test_every_training_takes_the_lowest_rate(training: str) -> None:
    assert "--min-learning-rate" in capfilt("train", training, "--help").out


def test_a_rate_below_the_lowest_is_refused_and_a_lower_lowest_helps(folder: Path) -> None:
    command = ("train", "stage2", folder / "run", "--init", folder / "none", "--llm", folder / "opt")
    command += ("--output", folder / "x", "--learning-rate", "2e-5")
    assert "min_learning_rate is 5e-05; expected 0 to learning_rate" in capfilt(*command).err
    assert "none: it is no folder" in capfilt(*command, "--min-learning-rate", "1e-5").err  # past the settings


def test_wrong_usage(folder: Path) -> None:
    for arguments, said in (
        (("generate", folder / "blip", folder / "red.png"), "Blip2ForConditionalGeneration"),
        (("generate", folder / "blip", folder / "text.png"), "cannot be used"),
        (("generate", folder / "blip", folder / "red.png", "--answer"), "--prompt"),
        (("generate", folder / "blip", folder / "red.png", "--dtype", "int8"), "dtype"),
        (("train", "stage1", folder / "run", "--output", folder / "x"), "image encoder"),
        (("train", "blip", folder / "run", "--output", folder / "x"), "tokenizer"),
        (("train", "captioner", folder / "run", "--init", "x", "--output", "x", "--known-false"), "--known-false"),
        (("train", "filter", folder / "run", "--init", "x", "--output", "x", "--prompt", "a"), "--prompt"),
        (("train", "filter", folder / "run", "--init", "x", "--output", "x", "--captions-per-image", 2), "--captions"),
    ):
        done = capfilt(*arguments)
        assert done.code == 2, (arguments, done)
        assert said in done.err, (arguments, done)
