"""Training a CLIP: it learns, goes on exactly where it stopped, and plain open_clip opens what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.settings import ClipTrainSettings
from capfilt.train.batches import from_arrays
from capfilt.train.clip import WEIGHTS_FILE, build_clip, clip_similarity, train_clip, train_clip_on
from capfilt.world.language import full_caption
from capfilt.world.scenes import draw_scene, render
from capfilt.world.tokenizers import build_clip_tokenizer, build_t5_tokenizer

SETTINGS = ClipTrainSettings(
    image_size_px=32, vision_width=4, text_width=32, text_layers=1, embed_dim=16, batch_size=16, max_steps=8,
    warmup_steps=2, save_every_steps=4, log_every_steps=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_clip_tokenizer(folder)
    return folder


def draw_pairs(num_scenes: int) -> tuple[np.ndarray, list[str]]:
    scenes = [draw_scene(seed) for seed in range(num_scenes)]
    captions = [full_caption(scene, np.random.default_rng(scene.seed)) for scene in scenes]
    return np.stack([render(scene, 32, 32) for scene in scenes]), captions


def test_learns_to_find_the_caption_of_a_picture(tokenizer_dir: Path, tmp_path: Path) -> None:
    images, captions = draw_pairs(32)
    settings = replace(SETTINGS, max_steps=60, batch_size=32, learning_rate=4e-3)
    dataset = from_arrays(images, [[c] for c in captions])
    summary = train_clip_on(dataset, tokenizer_dir, settings, tmp_path)
    assert summary.last_losses["loss"] < 0.5 * summary.first_losses["loss"]
    found = clip_similarity(tmp_path, images, captions).argmax(axis=1)
    assert np.mean(found == np.arange(32)) > 0.5


def test_goes_on_exactly_where_it_stopped(tokenizer_dir: Path, tmp_path: Path) -> None:
    images, captions = draw_pairs(40)
    dataset = from_arrays(images, [[c] for c in captions])
    train_clip_on(dataset, tokenizer_dir, SETTINGS, tmp_path / "whole")
    train_clip_on(dataset, tokenizer_dir, SETTINGS, tmp_path / "parts")
    for name in ("training.json", WEIGHTS_FILE):  # as if it had been killed after its first checkpoint
        (tmp_path / "parts" / name).unlink()
    (tmp_path / "parts" / "checkpoints" / f"step-{SETTINGS.max_steps:08d}").rename(tmp_path / "last")
    train_clip_on(dataset, tokenizer_dir, SETTINGS, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name  # batch norm's running statistics too
    assert train_clip_on(dataset, tokenizer_dir, SETTINGS, tmp_path / "parts").already_done


def test_plain_open_clip_opens_what_is_saved(run: RunDir, tokenizer_dir: Path, tmp_path: Path) -> None:
    train_clip([run.path], tokenizer_dir, replace(SETTINGS, max_steps=2), tmp_path)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    tokens = tokenize(["a small red ball", "two large boxes on the grass"])
    assert tokens.shape == (2, SETTINGS.context_length)
    assert tokens.argmax(dim=1).tolist() == [5, 7]
    oblong = Image.fromarray(np.zeros((40, 100, 3), np.uint8))
    assert transform(oblong).shape == (3, 32, 32)  # type: ignore[operator]
    for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items():
        assert tensor.dtype in (torch.float16, torch.int64), name
    ours = build_clip(SETTINGS, len(tokenize.tokenizer))
    assert ours.state_dict().keys() == model.state_dict().keys()
    scores = clip_similarity(tmp_path, np.zeros((3, 32, 32, 3), np.uint8), ["a ball", "no ball"])
    assert scores.shape == (2, 3)
    assert np.abs(scores).max() <= 1 + 1e-5


def test_the_tokenizer_is_saved_as_it_was(run: RunDir, tokenizer_dir: Path, tmp_path: Path) -> None:
    train_clip([run.path], tokenizer_dir, replace(SETTINGS, max_steps=1), tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (tokenizer_dir / file).read_bytes()


def test_a_tokenizer_whose_end_is_not_the_last_id_is_refused(tmp_path: Path) -> None:
    images, captions = draw_pairs(16)
    build_t5_tokenizer(tmp_path / "t5")
    dataset = from_arrays(images, [[c] for c in captions])
    with pytest.raises(UsageError, match="expected the highest"):
        train_clip_on(dataset, tmp_path / "t5", SETTINGS, tmp_path / "out")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        train_clip_on(dataset, tmp_path / "none", SETTINGS, tmp_path / "out")


@pytest.mark.parametrize(
    "odd", [{"vision_stages": (1, 1)}, {"image_size_px": 60}, {"text_width": 40}, {"context_length": 2}]
)
def test_odd_sizes_are_refused(odd: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(odd))):
        replace(SETTINGS, **odd)
