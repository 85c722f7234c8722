"""Training and generating through the command line, with small random models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from capfilt.data.rundir import RunDir
from capfilt.settings import Stage1Settings, Stage2Settings, TrainSettings
from capfilt.train.pairs import runs_digest
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
    assert "stage 1: 2 steps, mean loss" in done.out
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


@pytest.mark.parametrize("part", ["captioner", "filter"])
def test_fine_tuning(folder: Path, part: str) -> None:
    init = folder / ("captioner" if part == "captioner" else "blip")
    done = capfilt(
        "train", part, folder / "run", "--init", init, "--output", folder / f"tuned-{part}", *STEPS, "--json"
    )
    assert done.code == 0, done.err
    assert done.json()["steps"] == 2
    assert (folder / f"tuned-{part}" / "config.json").exists()


def test_albef_from_the_command_line(folder: Path) -> None:
    output, bert = folder / "albef", small_models.save_bert(folder / "bert")
    sizes = ("--vision-width", 32, "--vision-depth", 1, "--head-width", 16, "--patch-size-px", 8, "--embed-dim", 8)
    sizes += ("--text-depth", 1, "--fusion-depth", 1, "--image-size-px", 32, "--set", "queue_size=16")
    command = ("train", "albef", folder / "run", "--text-init", bert, "--output", output, *STEPS, *sizes)
    refused = capfilt(*command, "--save-original")
    assert (refused.code, "Attention heads of width 16 (image) and 8 (text)" in refused.err) == (2, True), refused.err
    done = capfilt(*command)
    assert done.code == 0, done.err
    assert "albef: 2 steps, mean loss" in done.out
    assert f"Next: capfilt evaluate retrieval {output}" in done.err
    init = ("--init", output, "--output", folder / "albef-2", "--set", "losses=itc,mlm", "--json")
    done = capfilt("train", "albef", folder / "run", *init, *STEPS)
    assert done.code == 0, done.err
    assert set(done.json()["last_losses"]) == {"itc", "mlm", "loss"}
    recalls = capfilt("evaluate", "retrieval", folder / "albef-2", "--references", folder / "run", "--k-test", 4)
    assert recalls.code == 0, recalls.err
    assert capfilt("train", "albef", folder / "run", "--output", folder / "none").code == 2


TRAININGS = ("blip", "captioner", "filter", "albef", "stage1", "stage2", "clip", "llm")
WHAT_IT_NEEDS = {
    "captioner": ("--init", "x"), "filter": ("--init", "x"), "stage2": ("--init", "x", "--llm", "x"),
    "clip": ("--tokenizer", "x"), "llm": ("--tokenizer", "x"),
}  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, training: str, *arguments: object) -> tuple[Any, TrainSettings]:
    """What `capfilt train TRAINING` trains on and with which settings; nothing is trained."""
    calls: list[tuple[Any, TrainSettings]] = []

    def train(data: object, *rest: object) -> SimpleNamespace:
        calls.append((data, next(item for item in rest if isinstance(item, TrainSettings))))
        return SimpleNamespace(steps=0, first_losses={}, last_losses={}, already_done=True)

    module = "blip" if training in ("captioner", "filter") else training
    monkeypatch.setattr(f"capfilt.train.{module}.train_{training}", train)
    done = capfilt("train", training, "--output", "x", *WHAT_IT_NEEDS.get(training, ()), *arguments)
    assert done.code == 0, done.err
    return calls[0]


@pytest.mark.parametrize("training", TRAININGS)
def test_every_training_takes_any_setting_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, training: str
) -> None:
    plain = call(monkeypatch, training, folder / "run")[1]
    assert (plain.optimizer, plain.autocast) == ("adamw", "float32")
    given = ("--autocast", "bfloat16", "--set", "optimizer=muon", "--set", "weight_decay=0", "--set", "batch_size=7")
    settings = call(monkeypatch, training, folder / "run", *given)[1]
    assert (settings.autocast, settings.optimizer, settings.weight_decay) == ("bfloat16", "muon", 0.0)
    assert (settings.batch_size, settings.max_steps) == (7, plain.max_steps)


def test_settings_by_name_are_typed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = ("losses=itc, itm", "init_weights=false", "random_flip=true", "random_crop=0.5", "embed_dim=8")
    values += ("qformer_init=a=b,c",)
    settings = call(monkeypatch, "stage1", folder / "run", *(part for value in values for part in ("--set", value)))[1]
    assert settings == Stage1Settings(
        losses=("itc", "itm"), init_weights=False, random_flip=True, random_crop=0.5, embed_dim=8, qformer_init="a=b,c"
    )
    assert isinstance(settings.random_crop, float)
    stages = call(monkeypatch, "clip", folder / "run", "--set", "vision_stages=1,2,1,1")[1]
    assert stages.vision_stages == (1, 2, 1, 1)  # type: ignore[attr-defined]


def test_frozen_image_encoders_have_their_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ("--image-encoder", "open_clip:ViT-L-14:openai", "--encoder-dtype", "bfloat16", "--feature-cache-dir", "f")
    own = (
        "--init",
        "x",
        "--image-encoder-layer",
        "last",
        "--image-size-px",
        336,
        "--set",
        "feature_cache_dtype=float16",
    )
    settings = call(monkeypatch, "stage1", folder / "run", *shared, *own)[1]
    assert settings == Stage1Settings(
        init="x", image_encoder="open_clip:ViT-L-14:openai", image_encoder_layer="last", image_size_px=336,
        encoder_dtype="bfloat16", feature_cache_dir="f", feature_cache_dtype="float16",
    )  # fmt: skip
    settings = call(monkeypatch, "stage2", folder / "run", *shared)[1]
    assert settings == Stage2Settings(
        image_encoder="open_clip:ViT-L-14:openai", encoder_dtype="bfloat16", feature_cache_dir="f"
    )
    done = capfilt("train", "stage1", folder / "run", "--output", "x", "--image-encoder-layer", "first")
    assert "image_encoder_layer is 'first'; expected one of auto, second-last, last" in done.err


def test_a_training_goes_by_settings_given_by_name(folder: Path, tmp_path: Path) -> None:
    command = ("train", "stage1", folder / "run", "--output", tmp_path / "out", "--image-encoder", folder / "blip")
    done = capfilt(*command, *STEPS, "--set", "losses=itc,itm", "--set", "autocast=bfloat16", "--json")
    assert done.code == 0, done.err
    assert set(done.json()["last_losses"]) == {"itc", "itm", "loss"}
    assert json.loads((tmp_path / "out" / "training.json").read_text())["fields"]["autocast"] == "bfloat16"
    assert capfilt(*command, *STEPS, "--set", "losses=itc,itm").code == 3


@pytest.mark.parametrize(
    ("training", "given", "said"),
    [
        (
            "stage1",
            ("--set", "droput=0"),
            "no setting droput. Did you mean dropout?",
        ),
        ("captioner", ("--set", "losses=itc"), "no setting losses"),
        ("filter", ("--set", "label_smoothing=0"), "no setting label_smoothing"),
        ("stage1", ("--set", "dropout=much"), "dropout is 'much'; expected a number"),
        ("stage1", ("--set", "num_queries=1.5"), "num_queries is '1.5'; expected a whole number"),
        ("stage1", ("--set", "init_weights=yes"), "init_weights is 'yes'; expected true or false"),
        ("clip", ("--set", "vision_stages=1,b"), "vision_stages is '1,b'; expected a whole number"),
        ("stage1", ("--set", "losses="), "losses is (); expected some of itc, itm, itg"),
        ("stage1", ("--set", "dropout=2"), "dropout is 2.0; expected 0 or more"),
        ("stage2", ("--set", "beta2=nan"), "beta2 is nan; expected 0 or more"),
        ("stage1", ("--set", "optimizer"), "expected NAME=VALUE"),
        ("stage1", ("--set", "dropout=0", "--set", "dropout=0"), "--set dropout is given twice"),
        ("stage2", ("--max-steps", 3, "--set", "max_steps=4"), "--max-steps and --set max_steps are both given"),
        ("filter", ("--known-false", "--set", "known_false=true"), "--known-false and --set known_false are both"),
    ],
)
def test_settings_by_name_that_are_refused(folder: Path, training: str, given: tuple[object, ...], said: str) -> None:
    done = capfilt("train", training, folder / "run", "--output", "x", *WHAT_IT_NEEDS.get(training, ()), *given)
    assert done.code == 2
    assert said in done.err


@pytest.fixture(scope="module")
def first_captions(folder: Path) -> RunDir:
    """The generation `first` of the run, whose manifest keeps one caption of an image instead of two."""
    return small_models.save_generation(folder / "run", "first")


@pytest.mark.parametrize("training", [name for name in TRAININGS if name != "llm"])
def test_every_training_opens_a_generation(
    first_captions: RunDir, monkeypatch: pytest.MonkeyPatch, training: str
) -> None:
    path = first_captions.path
    for option, expected in (((), None), (("--generation", "first"), "first")):
        runs = call(monkeypatch, training, path, path, *option)[0]
        assert [(run.path, run.generation) for run in runs] == [(path, expected)] * 2


def test_training_on_a_generation(folder: Path, first_captions: RunDir, tmp_path: Path) -> None:
    command = ("train", "stage1", folder / "run", "--image-encoder", folder / "blip", *STEPS)
    done = capfilt(*command, "--output", tmp_path / "out", "--generation", "first")
    assert done.code == 0, done.err
    assert done.err.rstrip().endswith("--output DIR --generation first")
    digest = json.loads((tmp_path / "out" / "training.json").read_text())["fields"]["input"]
    assert digest == runs_digest([first_captions])
    assert digest != runs_digest([folder / "run"])

    missing = capfilt(*command, "--output", tmp_path / "none", "--generation", "none")
    assert missing.code == 2
    assert "no manifest of the generation none yet" in missing.err
    assert "--generation none" in missing.err


@pytest.mark.parametrize("training", TRAININGS)
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
