"""Features on disk: what is stored, when it is used again, what a crash leaves, and what training does with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from capfilt.data.rundir import RunDir
from capfilt.errors import CapfiltError, CorruptionError, UsageError
from capfilt.progress import NullProgress
from capfilt.settings import Stage1Settings, Stage2Settings
from capfilt.train import feature_store
from capfilt.train.batches import from_arrays
from capfilt.train.feature_store import FeatureFile, open_features
from capfilt.train.features import pixels_digest
from capfilt.train.pairs import kept_images_digest
from capfilt.train.stage1 import train_stage1, train_stage1_on
from tests.train import small_models
from tests.train.test_stage1 import settings_for

FEATURES = torch.randn(70, 3, 4, generator=torch.Generator().manual_seed(0))


def file_in(folder: Path, dtype: torch.dtype = torch.float32) -> FeatureFile:
    return FeatureFile(folder, "abc", (70, 3, 4), dtype)


class Encoder:
    """Gives the rows of FEATURES, and notes which were asked for; fails at a row."""

    def __init__(self, dtype: torch.dtype = torch.float32, fails_at: int = 1000) -> None:
        self.dtype, self.fails_at, self.asked = dtype, fails_at, list[int]()

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        if self.fails_at in rows:
            raise RuntimeError("power cut")
        self.asked += rows.tolist()
        return FEATURES[torch.from_numpy(rows)].to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_is_what_was_encoded_and_encoded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = Encoder(dtype)
    for _ in range(2):
        found = open_features(file_in(tmp_path, dtype), encoder, 16, NullProgress())
        assert found.dtype == dtype
        assert torch.equal(found, FEATURES.to(dtype))
    assert encoder.asked == list(range(70))
    assert (tmp_path / "abc.features").stat().st_size == 70 * 3 * 4 * dtype.itemsize
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abc.features", "abc.json", "abc.lock"]


def test_a_fill_that_was_cut_off_goes_on_and_is_never_used_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "SYNC_ROWS", 20)
    with pytest.raises(RuntimeError, match="power cut"):
        open_features(file_in(tmp_path), Encoder(fails_at=50), 10, NullProgress())
    assert not (tmp_path / "abc.features").exists()
    assert json.loads((tmp_path / "abc.part.json").read_text())["rows"] == 40
    with open(tmp_path / "abc.part", "ab") as handle:
        handle.write(b"half a row")  # what was written behind the last note does not count
    encoder = Encoder()
    assert torch.equal(open_features(file_in(tmp_path), encoder, 10, NullProgress()), FEATURES)
    assert encoder.asked == list(range(40, 70))


def test_processes_of_one_training_wait_for_the_one_that_writes(tmp_path: Path) -> None:
    encoder = Encoder()
    with ThreadPoolExecutor(3) as pool:  # each opens the lock on its own, as processes do
        found = [pool.submit(open_features, file_in(tmp_path), encoder, 1, NullProgress()) for _ in range(3)]
    assert all(torch.equal(each.result(), FEATURES) for each in found)
    assert encoder.asked == list(range(70))


def test_a_file_may_be_larger_than_the_memory(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path, "abc", (1 << 20, 1 << 8, 1 << 10), torch.float32)
    with open(file.path, "wb") as handle:
        handle.truncate(file.num_bytes)  # 1 TiB, none of it on the disk
        handle.seek(file.num_bytes - 4)
        handle.write(np.float32(2.5).tobytes())
    file.record_path.write_text(json.dumps(file.record()))
    found = open_features(file, Encoder(), 16, NullProgress())
    assert found[torch.tensor([0, -1])].sum() == 2.5


@pytest.mark.parametrize("damage", ["shorter", "no note", "other shape"])
def test_a_part_that_does_not_match_its_note_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(feature_store, "SYNC_ROWS", 20)
    with pytest.raises(RuntimeError, match="power cut"):
        open_features(file_in(tmp_path), Encoder(fails_at=50), 10, NullProgress())
    if damage == "shorter":
        with open(tmp_path / "abc.part", "r+b") as handle:
            handle.truncate(100)
    elif damage == "no note":
        (tmp_path / "abc.part.json").write_text("{")
    else:
        note = json.loads((tmp_path / "abc.part.json").read_text())
        (tmp_path / "abc.part.json").write_text(json.dumps(note | {"shape": [70, 4, 3]}))
    encoder = Encoder()
    assert torch.equal(open_features(file_in(tmp_path), encoder, 10, NullProgress()), FEATURES)
    assert encoder.asked == list(range(70))


def test_a_finished_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    open_features(file_in(tmp_path), Encoder(), 16, NullProgress())
    with open(tmp_path / "abc.features", "r+b") as handle:
        handle.truncate(70 * 3 * 4 * 4 - 1)
    with pytest.raises(CorruptionError, match=r"is not what abc\.json says. Remove both"):
        open_features(file_in(tmp_path), Encoder(), 16, NullProgress())


def test_what_does_not_fit_on_the_disk_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=3000))
    encoder = Encoder()
    with pytest.raises(UsageError, match=r"70 images take 3\.4 kB more .* 3\.0 kB are free"):
        open_features(file_in(tmp_path), encoder, 16, NullProgress())
    assert encoder.asked == []
    assert torch.equal(
        open_features(file_in(tmp_path, torch.float16), Encoder(torch.float16), 16, NullProgress()), FEATURES.half()
    )


def test_a_disk_that_fills_up_on_the_way_is_said(tmp_path: Path) -> None:
    message = r"abc\.part cannot be written \(No space left on device\)"
    with open("/dev/full", "wb", buffering=0) as handle, pytest.raises(UsageError, match=message):
        feature_store._append(handle, b"features", file_in(tmp_path))


def test_size_and_free_space_are_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Names(NullProgress):
        names: list[str] = []

        def start(self, name: str, total: int | None, unit: str, /) -> None:
            self.names.append(name)

    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=12_300_000_000))
    open_features(file_in(tmp_path), Encoder(), 16, Names())
    assert Names.names == [f"features (3.4 kB into {tmp_path}, 12.3 GB free)"]


def test_numbers_beyond_the_stored_precision_and_a_place_that_is_no_directory(tmp_path: Path) -> None:
    def encode(rows: np.ndarray) -> torch.Tensor:
        return (FEATURES[torch.from_numpy(rows)] * 1e6).half()

    with pytest.raises(CapfiltError, match=r"not finite in torch\.float16. Give feature_cache_dtype=float32"):
        open_features(file_in(tmp_path, torch.float16), encode, 16, NullProgress())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        open_features(file_in(tmp_path / "file"), Encoder(), 16, NullProgress())


Train = Callable[..., dict[str, float]]


@pytest.fixture
def train(blip_dir: Path, tmp_path: Path) -> Train:
    """Losses of a short stage 1, whose outputs lie apart."""
    images, captions = small_models.draw_pairs(40)

    def run(name: str, **changes: object) -> dict[str, float]:
        settings = settings_for(blip_dir, **changes)
        return train_stage1_on(from_arrays(images, captions), settings, tmp_path / name).last_losses

    return run


def test_losses_with_features_on_disk_are_those_without(train: Train, tmp_path: Path) -> None:
    directory = str(tmp_path / "features")
    memory = train("memory")
    assert train("disk", feature_cache_dir=directory, feature_cache_bytes=0) == memory
    assert train("disk-again", feature_cache_dir=directory) == memory
    assert len(list((tmp_path / "features").glob("*.features"))) == 1
    assert train("fresh", feature_cache_bytes=0) == pytest.approx(memory, abs=1e-4)
    half = train("half", feature_cache_dir=directory, feature_cache_dtype="bfloat16")
    assert half != memory
    assert half == pytest.approx(memory, rel=0.05)
    assert train("half-memory", feature_cache_dtype="bfloat16") == half
    train("layer", feature_cache_dir=directory, image_encoder_layer="second-last")
    assert len(list((tmp_path / "features").glob("*.features"))) == 3


def test_the_digest_is_one_of_images_not_of_captions(tmp_path: Path) -> None:
    run = small_models.save_run(tmp_path / "run", [12, 8], drop_every=5)
    digest = kept_images_digest([run])
    assert kept_images_digest([small_models.save_generation(run.path, "first")]) == digest
    assert kept_images_digest([small_models.save_run(tmp_path / "other", [12, 8], drop_every=4)]) != digest
    images, captions = small_models.draw_pairs(6)
    assert pixels_digest(from_arrays(images, captions)) == pixels_digest(from_arrays(images, captions[::-1]))
    assert pixels_digest(from_arrays(images, captions)) != pixels_digest(from_arrays(images[::-1], captions))


def test_a_run_trains_from_features_on_disk(run: RunDir, blip_dir: Path, tmp_path: Path) -> None:
    settings = settings_for(blip_dir, feature_cache_dir=str(tmp_path / "features"))
    on_disk = train_stage1([run], settings, tmp_path / "disk")
    assert on_disk.last_losses == train_stage1([run], settings_for(blip_dir), tmp_path / "memory").last_losses


@pytest.mark.parametrize("cls", [Stage1Settings, Stage2Settings])
def test_images_that_vary_have_no_features_on_disk(cls: type[Stage1Settings] | type[Stage2Settings]) -> None:
    for varied in ({"random_crop": 0.5}, {"random_flip": True}):
        with pytest.raises(UsageError, match="feature_cache_dir is 'x'; expected None with random_crop or random_flip"):
            cls(feature_cache_dir="x", **varied)
    with pytest.raises(UsageError, match="feature_cache_dtype is 'int8'"):
        cls(feature_cache_dtype="int8")
    with pytest.raises(UsageError, match="encoder_dtype is 'int8'"):
        cls(encoder_dtype="int8")
