"""`CuratedDataset` in plain `DataLoader`s: whole, no image twice, disjoint among ranks, and to be gone on from."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import capfilt.train.curated as curated
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.errors import UsageError
from capfilt.train.curated import CuratedDataset
from tests.train.small_models import save_generation, save_run


def key_of(sample: dict[str, Any]) -> str:
    return sample["key"]


def as_list(batch: list[Any]) -> list[Any]:
    return batch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Shards of uneven sizes; every fifth image has nothing kept."""
    return save_run(tmp_path_factory.mktemp("runs") / "run", [13, 4, 9, 11, 5], drop_every=5)


def kept_keys(run: RunDir) -> set[str]:
    return set(read_manifest([run], kept_only=True)["key"].to_pylist())


def batches_of(dataset: CuratedDataset, batch_size: int, num_workers: int) -> list[list[str]]:
    options: dict[str, Any] = {"num_workers": num_workers, "collate_fn": as_list}
    loader = DataLoader(dataset, batch_size=batch_size, **options)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def test_samples_are_those_of_shards_and_manifest(run: RunDir) -> None:
    rows = read_manifest([run], kept_only=True).to_pylist()
    texts = {key: [row["text"] for row in rows if row["key"] == key] for key in kept_keys(run)}
    pixels = {
        sample.key: np.asarray(Image.open(io.BytesIO(sample.image)))
        for shard in run.shard_names() for sample in read_samples(run, shard)
    }  # fmt: skip
    found = list(CuratedDataset(run.path, seed=3))
    assert sorted(sample["key"] for sample in found) == sorted(texts)
    for sample in found:
        assert sample["texts"] == texts[sample["key"]]
        assert sample["text"] in sample["texts"]
        assert np.array_equal(np.asarray(sample["image"]), pixels[sample["key"]])
        assert (sample["image"].mode, sample["run"]) == ("RGB", str(run.path))


def test_epochs_differ_in_order_and_text_and_are_repeatable(run: RunDir) -> None:
    data = CuratedDataset(run)
    seen = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        seen.append([(sample["key"], sample["text"]) for sample in data])
    assert seen[0] == seen[2] != seen[1]
    assert dict(seen[0]) != dict(seen[1]), "other texts"
    assert seen[0] != [(s["key"], s["text"]) for s in CuratedDataset(run, seed=1)]
    plain = list(CuratedDataset(run, shuffle=False))
    assert [sample["key"] for sample in plain] == sorted(kept_keys(run))
    assert all(sample["text"] == sample["texts"][0] for sample in plain)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # of more workers than cores
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_loaders_give_an_epoch_and_go_on_in_it(run: RunDir, num_workers: int, batch_size: int) -> None:
    def fresh() -> CuratedDataset:
        return CuratedDataset(run, transform=key_of, batch_size=batch_size)

    whole = batches_of(fresh(), batch_size, num_workers)
    assert Counter(key for batch in whole for key in batch) == Counter(kept_keys(run))
    assert [len(batch) for batch in whole[:-1]] == [batch_size] * (len(whole) - 1)
    for num_taken in (1, 2, len(whole) - 1, len(whole)):
        data = fresh()
        data.skip(min(num_taken * batch_size, len(data)))
        loader = DataLoader(data, batch_size=batch_size, num_workers=num_workers, collate_fn=as_list)
        assert list(loader) == whole[num_taken:]


def consumers(run: RunDir, num_ranks: int, num_workers: int, batch_size: int, skipped: int) -> Iterator[list[int]]:
    """The rows of each worker of each rank, without processes."""
    for rank in range(num_ranks):
        data = CuratedDataset(run, rank=rank, num_ranks=num_ranks, batch_size=batch_size)
        data.skip(min(skipped * batch_size, len(data) // batch_size * batch_size))
        for worker in range(num_workers):
            info = type("Info", (), {"id": worker, "num_workers": num_workers})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(curated, "get_worker_info", lambda info=info: info)
                yield data._rows_of_worker().tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
def test_ranks_and_workers_share_an_epoch(
    run: RunDir, num_ranks: int, num_workers: int, batch_size: int, skipped: int
) -> None:
    num = len(kept_keys(run))
    each = num // num_ranks
    left = each - min(skipped * batch_size, each // batch_size * batch_size)
    parts = list(consumers(run, num_ranks, num_workers, batch_size, skipped))
    rows = [row for part in parts for row in part]
    assert len(set(rows)) == len(rows) == left * num_ranks
    for rank in range(num_ranks):
        own = parts[rank * num_workers : (rank + 1) * num_workers]
        assert sum(-(-len(part) // batch_size) for part in own) == -(-left // batch_size), "as many batches as it says"


def test_a_state_is_gone_on_from(run: RunDir) -> None:
    data = CuratedDataset(run, transform=key_of)
    data.set_epoch(4)
    stream = iter(data)
    begun = [next(stream) for _ in range(6)]
    state = data.state_dict()
    other = CuratedDataset(run, transform=key_of)
    other.load_state_dict(state)
    assert [*begun, *other] == [*begun, *stream]
    assert len(list(other)) == len(other), "the next time from the beginning"


def test_several_runs_generations_and_cleaned_texts(tmp_path: Path, run: RunDir) -> None:
    other = save_run(tmp_path / "other", [6], seed=50)
    both = list(CuratedDataset([run, other.path]))
    assert Counter(sample["run"] for sample in both) == {str(run.path): len(kept_keys(run)), str(other.path): 6}
    one = list(CuratedDataset(save_generation(other.path, "one")))
    assert [len(sample["texts"]) for sample in one] == [1] * 6
    texts = [sample["texts"] for sample in CuratedDataset(other, clean=True, shuffle=False)]
    assert texts == [[text.lower() for text in own] for own in texts]


def test_what_cannot_be_is_said(tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is not a run"):
        CuratedDataset(tmp_path)
    with pytest.raises(UsageError, match="fewer than 1000 ranks"):
        CuratedDataset(run, rank=0, num_ranks=1000)
    with pytest.raises(UsageError, match="expected both"):
        CuratedDataset(run, rank=1)
    with pytest.raises(UsageError, match="multiple of the batch size 4"):
        CuratedDataset(run, batch_size=4).skip(6)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(CuratedDataset(run)) == len(kept_keys(run)) // 2, "as torchrun says"
