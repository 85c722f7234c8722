"""BLIP-2's fine-tuning for questions: answers get better, features lie once for an image, frames."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capfilt.data.questions import read_questions
from capfilt.evaluate.vqa import evaluate_answerer
from capfilt.evaluate.writers import load_writer
from capfilt.models.blip2 import Blip2FineTuning, Stage2
from capfilt.models.qformer import QFormerConfig
from capfilt.settings import Blip2VqaSettings, GenerationSettings
from capfilt.train.blip2_tuning import train_blip2_vqa
from capfilt.train.question_pairs import QuestionFiles
from capfilt.train.saved import save_stage2
from capfilt.weights.image_encoders import load_image_encoder
from capfilt.weights.llms import load_llm
from capfilt.world.questions import write_world_questions
from tests.evaluate.small_blip2 import save_blip2

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["opt", "t5"])
def stage2_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("blip2") / request.param, request.param)


@pytest.fixture(scope="module")
def world_files(tmp_path_factory: pytest.TempPathFactory) -> QuestionFiles:
    folder = tmp_path_factory.mktemp("questions")
    write_world_questions(folder, 60, questions_per_scene=2)
    return QuestionFiles(folder / "questions.json", folder / "annotations.json", folder / "images")


@pytest.fixture(scope="module")
def world_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 model of the embedded image encoder and OPT, whose Q-Former and projection are random."""
    folder = tmp_path_factory.mktemp("world") / "stage2"
    folder.mkdir()
    encoder = load_image_encoder("embedded", CPU)
    torch.manual_seed(0)
    config = QFormerConfig(
        num_queries=8, width=64, depth=2, num_heads=2, mlp_width=128, vision_width=encoder.vision.config.width,
        with_text=False, dropout=0.0,
    )  # fmt: skip
    save_stage2(folder, encoder, Stage2(config, load_llm("capfilt/world/assets/opt")))
    return folder


def accuracy(model: Path, files: QuestionFiles) -> float:
    questions = read_questions(files.questions, files.annotations, files.images_dir)
    writer = load_writer(model, "answer", GenerationSettings(device="cpu", dtype="float32", num_beams=1))
    found = evaluate_answerer(writer, questions).accuracy
    assert found is not None
    return found


def test_answers_to_the_worlds_questions_get_better(
    world_files: QuestionFiles, world_start: Path, tmp_path: Path
) -> None:
    settings = Blip2VqaSettings(
        dropout=0.0, max_steps=40, batch_size=32, accumulation_steps=1, warmup_steps=5, learning_rate=2e-2,
        optimizer="muon", image_size_px=0, log_every_steps=5, device="cpu",
    )  # fmt: skip
    summary = train_blip2_vqa([world_files], world_start, "", settings, tmp_path)
    assert summary.last_losses["lm"] < 0.5 * summary.first_losses["lm"]
    before, after = accuracy(world_start, world_files), accuracy(tmp_path, world_files)
    assert after > before + 30


def test_kept_features_train_as_fresh_ones_and_lie_once_for_an_image(
    world_files: QuestionFiles, world_start: Path, tmp_path: Path
) -> None:
    losses = []
    for name, changes in {
        "fresh": {"feature_cache_bytes": 0}, "memory": {}, "disk": {"feature_cache_dir": str(tmp_path / "features")},
    }.items():  # fmt: skip
        settings = Blip2VqaSettings(
            dropout=0.0, max_steps=2, batch_size=16, accumulation_steps=2, warmup_steps=0, learning_rate=1e-3,
            image_size_px=0, device="cpu", **changes,
        )  # fmt: skip
        losses.append(train_blip2_vqa([world_files], world_start, "", settings, tmp_path / name).last_losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[1] == pytest.approx(losses[2], abs=1e-6)
    (record,) = (tmp_path / "features").glob("*.json")
    assert json.loads(record.read_text())["shape"][0] == 60


def test_the_model_is_asked_in_its_frame_or_in_the_one_given(
    world_files: QuestionFiles, stage2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    plain = Blip2FineTuning.forward

    def forward(self: Blip2FineTuning, prompts: list[str], texts: list[str], **rest: Any) -> dict[str, Tensor]:
        seen.extend(f"{prompt}|{text}" for prompt, text in zip(prompts, texts, strict=True))
        return plain(self, prompts, texts, **rest)

    monkeypatch.setattr(Blip2FineTuning, "forward", forward)
    settings = Blip2VqaSettings(
        max_steps=1, batch_size=120, accumulation_steps=1, warmup_steps=0, image_size_px=0, device="cpu"
    )
    questions = read_questions(world_files.questions, world_files.annotations)
    num = len(questions)
    short = " Short" if stage2_dir.name == "t5" else ""
    for prompt, frame in (("", f"Question: {{}}{short} Answer:"), ("{} say:", "{} say:")):
        seen.clear()
        chosen = replace(settings, batch_size=num, prompt=prompt)
        train_blip2_vqa([world_files], stage2_dir, "", chosen, tmp_path / str(len(prompt)))
        frame = frame.replace("Short Answer", "Short answer")
        expected = {f"{frame.replace('{}', q.text)}|{q.answers.texts[0]}" for q in questions if q.answers}
        assert set(seen) == expected
        assert len(seen) == num
