"""Parts of a model's folder: what the digest covers, and how images are prepared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.errors import UsageError
from capfilt.weights.model_files import (
    CLIP_MEAN,
    CLIP_STD,
    ImagePreparation,
    read_config,
    read_preparation,
    weights_digest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_digest_is_of_the_model_and_not_of_its_making(folder: Path) -> None:
    first = weights_digest(folder)
    (folder / "training.json").write_text("{}")
    (folder / "log").write_text("step 1")
    assert weights_digest(folder) == first
    (folder / "vocab.txt").write_text("a")
    with_vocabulary = weights_digest(folder)
    (folder / "vocab.txt").rename(folder / "merges.txt")
    assert len({first, with_vocabulary, weights_digest(folder)}) == 3


def test_models_inside_a_folder_are_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    for part in ("captioner", "filter"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no readable config\.json\. There are models in its captioner, filter"):
        read_config(folder)


def test_preparation_has_the_encoder_s_size_and_the_processor_s_mean(folder: Path) -> None:
    assert read_preparation(folder, 64) == ImagePreparation(64, CLIP_MEAN, CLIP_STD)
    processor = {"size": {"height": 224, "width": 224}, "image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert read_preparation(folder, 64) == ImagePreparation(64, (0.5, 0.5, 0.5), (1, 1, 1))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0, 0, 0]}}))
    assert read_preparation(folder, 64) == ImagePreparation(64, (0, 0, 0), (1, 1, 1))
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"no readable processor_config\.json"):
        read_preparation(folder, 64)
