"""Batches from arrays and from shards: order, captions, crops, resumption."""

from __future__ import annotations

import gc
import io
import itertools
import json
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capfilt.curation.human_captions import write_human_manifest
from capfilt.curation.import_shards import import_shards
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.errors import CorruptionError, UsageError
from capfilt.models.ranks import ALONE, Ranks
from capfilt.settings import TrainSettings
from capfilt.train import pairs
from capfilt.train.batches import (
    CLIP_MEAN,
    CLIP_STD,
    ArrayPairs,
    Batch,
    Cursor,
    Draws,
    PairDataset,
    View,
    draw_captions,
    draw_view,
    from_arrays,
    iterate_batches,
)
from capfilt.train.pairs import RunPairs, read_pairs, runs_digest
from capfilt.train.pictures import num_decoders
from tests.curation.small_runs import encode_picture
from tests.curation.test_import_shards import write_foreign
from tests.train import small_models

SETTINGS = TrainSettings(batch_size=8, seed=3)


START = Cursor()


def take(dataset, number: int, cursor: Cursor = START, settings: TrainSettings = SETTINGS) -> list[Batch]:
    return list(itertools.islice(iterate_batches(dataset, settings, cursor), number))


@pytest.fixture(scope="module")
def arrays():
    images, captions = small_models.draw_pairs(30)
    return from_arrays(images, captions)


def same(one: Batch, other: Batch) -> bool:
    return (
        one.keys == other.keys
        and one.texts == other.texts
        and torch.equal(one.images_on("cpu"), other.images_on("cpu"))
    )


@given(st.integers(1, 6), st.integers(1, 15), st.integers(0, 2**64 - 1))
def test_captions_of_an_image_are_drawn_evenly(num_captions: int, number: int, seed: int) -> None:
    captions = [f"caption {n}" for n in range(num_captions)]
    drawn = draw_captions(captions, number, seed)
    assert drawn == draw_captions(captions, number, seed)
    counts = Counter(drawn)
    assert sum(counts.values()) == number
    assert set(counts) <= set(captions)
    assert max(counts.values()) - min(counts.get(caption, 0) for caption in captions) <= 1


def test_images_are_normalised(arrays) -> None:
    batch = take(arrays, 1)[0]
    expected = (arrays.images[batch.rows] / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(batch.images_on("cpu").permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert batch.images_on("cpu").dtype == torch.float32


def test_an_epoch_holds_every_image_once_and_drops_the_incomplete_batch(arrays) -> None:
    batches = take(arrays, 6)
    assert [batch.cursor.epoch for batch in batches] == [0, 0, 0, 1, 1, 1]
    first, second = [[key for b in batches[i : i + 3] for key in b.keys] for i in (0, 3)]
    assert len(set(first)) == 24
    assert first != second


def test_the_stream_goes_on_from_any_cursor_as_if_undisturbed(arrays) -> None:
    whole = take(arrays, 7)
    for number in range(6):
        assert same(take(arrays, 1, whole[number].cursor)[0], whole[number + 1])


def test_captions_are_drawn_evenly_and_anew_in_each_epoch(arrays) -> None:
    counts: Counter[bool] = Counter()
    per_key: dict[str, set[str]] = {}
    for batch in take(arrays, 90):
        for key, text in zip(batch.keys, batch.texts, strict=True):
            counts[text.startswith("here")] += 1
            per_key.setdefault(key, set()).add(text)
    assert 0.4 < counts[True] / counts.total() < 0.6
    assert all(len(texts) == 2 for texts in per_key.values())


def test_the_caption_does_not_depend_on_the_batch_size(arrays) -> None:
    drawn = []
    for size in (3, 10):
        batches = take(arrays, 30 // size, settings=TrainSettings(batch_size=size, seed=3))
        drawn.append({k: t for b in batches for k, t in zip(b.keys, b.texts, strict=True)})
    assert drawn[0] == drawn[1]


def test_crops_and_flips_are_pure_and_within_the_image(arrays) -> None:
    settings = TrainSettings(batch_size=8, random_crop=0.5, random_flip=True)
    one, other = take(arrays, 2, settings=settings), take(arrays, 2, settings=settings)
    assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert not same(one[0], take(arrays, 1, settings=TrainSettings(batch_size=8))[0])
    for seed, smallest_area in itertools.product(range(300), (0.5, 0.9)):
        view = draw_view(seed, smallest_area, True)
        assert view.left >= 0 <= view.top
        assert view.left + view.width <= 1.000001 >= view.top + view.height
        assert smallest_area - 1e-9 < view.width * view.height <= 1
        assert 3 / 4 - 0.001 < view.width / view.height < 4 / 3 + 0.001


def test_flips_without_a_crop_keep_the_whole_image() -> None:
    views = {draw_view(seed, 1.0, True) for seed in range(50)}
    assert views == {View(), View(mirrored=True)}


def test_too_few_images_for_a_batch(arrays) -> None:
    with pytest.raises(UsageError, match="30 images with kept captions do not fill a batch of 31"):
        iterate_batches(arrays, TrainSettings(batch_size=31))


def test_pairs_of_a_run_are_its_kept_captions_and_its_pictures(run: RunDir) -> None:
    dataset = read_pairs([run.path], image_size_px=small_models.IMAGE_PX)
    assert len(dataset.keys) == 76
    images, captions = small_models.draw_pairs(30, seed=1)  # the second shard
    row = list(dataset.keys).index("000010006")
    assert dataset.captions_of(row) == captions[6]
    np.testing.assert_array_equal(dataset.read_pixels(np.array([row]), None)[0], images[6])
    assert "000010004" not in dataset.keys


def test_streamed_pictures_are_those_held_in_memory(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SHUFFLED_SAMPLES", 50)
    held = read_pairs([run], image_size_px=16)
    streamed = read_pairs([run], image_size_px=16, memory_limit_bytes=0)
    held.open()
    assert held.pictures.in_memory
    assert not streamed.pictures.in_memory
    rows = np.array([70, 3, 40, 41, 0])
    np.testing.assert_array_equal(held.read_pixels(rows, None), streamed.read_pixels(rows, None))
    batches = take(streamed, 12)
    assert len({key for batch in batches[:9] for key in batch.keys}) == 72
    assert same(take(streamed, 1, batches[10].cursor)[0], batches[11])


def test_pictures_go_when_the_dataset_goes(run: RunDir) -> None:
    """Without waiting for the collector of cycles: they are gigabytes."""
    gc.disable()
    try:
        dataset = read_pairs([run], image_size_px=16)
        next(iterate_batches(dataset, SETTINGS))
        pictures = weakref.ref(dataset.pictures)
        del dataset
        assert pictures() is None
    finally:
        gc.enable()


def test_threads_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert num_decoders() == 2
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    for local, processors, expected in ((1, 96, 16), (8, 96, 12), (8, 12, 12), (48, 96, 2)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _process, count=processors: set(range(count)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert num_decoders() == expected


def test_streaming_shuffles_shards_and_samples_within_bounds(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SHUFFLED_SAMPLES", 60)
    dataset = read_pairs([run], image_size_px=16, memory_limit_bytes=0)
    shard_of = np.array([key[:5] for key in dataset.keys])
    orders = [dataset.order(0, epoch) for epoch in range(8)]
    assert all(sorted(order) == list(range(76)) for order in orders)
    assert len({tuple(shard_of[order][[0, -1]]) for order in orders}) > 1
    for order in orders:  # two groups: shards 0 and 1 together, shard 2
        third = np.flatnonzero(shard_of[order] == "00002")
        assert third[-1] - third[0] == len(third) - 1
        assert not np.array_equal(np.sort(order), order)


def test_several_runs_are_mixed(run: RunDir, tmp_path: Path) -> None:
    other = small_models.save_run(tmp_path / "other", [10], seed=50)
    dataset = read_pairs([run, other.path], image_size_px=16)
    assert len(dataset.keys) == 86
    assert runs_digest([run]) != runs_digest([run, other]) == runs_digest([run.path, other.path])


def test_a_run_without_kept_pairs(tmp_path: Path) -> None:
    run = small_models.save_run(tmp_path / "empty", [5], drop_every=1)
    with pytest.raises(UsageError, match="No kept pair in .*capfilt select"):
        read_pairs([run], image_size_px=16)


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    run = small_models.save_run(tmp_path / "damaged", [20])
    tar = run.tar_path("00000")
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    for limit in (0, 1 << 30):
        dataset = read_pairs([run], image_size_px=16, memory_limit_bytes=limit)
        with pytest.raises(CorruptionError, match="00000"):
            next(iterate_batches(dataset, SETTINGS))


@pytest.fixture
def streamed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> RunPairs:
    monkeypatch.setattr("capfilt.train.pairs.SHUFFLED_SAMPLES", 1)
    return read_pairs([run.path], image_size_px=16, memory_limit_bytes=0)


def first_keys(dataset: PairDataset, settings: TrainSettings, ranks: Ranks, num_batches: int) -> list[list[str]]:
    stream = iterate_batches(dataset, settings, ranks=ranks)
    return [next(stream).keys for _ in range(num_batches)]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_out_what_one_process_takes(arrays: ArrayPairs, num_ranks: int) -> None:
    settings = TrainSettings(batch_size=4)
    alone = first_keys(arrays, TrainSettings(batch_size=4 * num_ranks), ALONE, 5)
    shared = [first_keys(arrays, settings, Ranks(rank, num_ranks), 5) for rank in range(num_ranks)]
    assert [sum((own[step] for own in shared), []) for step in range(5)] == alone


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_streaming_ranks_take_equal_steps_from_shards_of_their_own(streamed: RunPairs, num_ranks: int) -> None:
    """76 images in shards of 32, 24 and 20: whatever the shards, every rank has as many batches of an epoch."""
    settings, epoch = TrainSettings(batch_size=4, seed=3), 1
    num_steps = 76 // (4 * num_ranks)
    start = Cursor(epoch, 0)
    found: list[list[str]] = []
    for rank in range(num_ranks):
        stream = iterate_batches(streamed, settings, start, ranks=Ranks(rank, num_ranks))
        batches = [next(stream) for _ in range(num_steps)]
        assert batches[-1].cursor == Cursor(epoch, num_steps * 4 * num_ranks)
        assert next(stream).cursor.epoch == epoch + 1
        found.append([key for batch in batches for key in batch.keys])
    together = [key for own in found for key in own]
    assert len(set(together)) == len(together) == num_steps * 4 * num_ranks
    shards = [{key[:5] for key in own} for own in found]
    assert sum(len(own) for own in shards) <= 3 + num_ranks - 1, "a shard is read by one rank, but at a seam"


def test_runs_are_shown_as_often_as_their_weights_say(run: RunDir, tmp_path: Path) -> None:
    other = small_models.save_run(tmp_path / "other", [20], seed=9)
    dataset = read_pairs([run.path, other.path], image_size_px=16, run_weights=(0.5, 2.25))
    counts = [Counter(dataset.order(0, epoch).tolist()) for epoch in range(4)]
    for epoch in counts:
        assert sum(n for row, n in epoch.items() if row < 76) == 38
        assert sum(n for row, n in epoch.items() if row >= 76) == 45
        assert max(n for row, n in epoch.items() if row < 76) == 1
        assert {n for row, n in epoch.items() if row >= 76} == {2, 3}
    assert counts[0] != counts[1], "another half in another epoch"
    assert dataset.num_shown == sum(counts[0].values()) == 83
    assert Cursor(1, 83).num_epochs(dataset.num_shown) == 2.0
    assert Cursor(0, 8).num_epochs(dataset.num_shown, num_taken=8) == 0.0, "before the first batch"
    with pytest.raises(UsageError, match="1 weights for 2 runs"):
        read_pairs([run.path, other.path], image_size_px=16, run_weights=(1.0,))


def test_equal_pictures_have_one_id_whatever_their_keys_and_runs(run: RunDir, tmp_path: Path) -> None:
    dataset = read_pairs([run.path, run.path], image_size_px=16)
    half = len(dataset.keys) // 2
    assert dataset.image_ids.min() >= 0
    assert np.array_equal(dataset.image_ids[:half], dataset.image_ids[half:])
    rows = read_manifest([run], ["key", "sha256"], kept_only=True).to_pylist()
    digests = {row["key"]: row["sha256"] for row in rows}
    same_digest = [[digests[a] == digests[b] for b in dataset.keys[:half]] for a in dataset.keys[:half]]
    ids = dataset.image_ids[:half]
    assert np.array_equal(ids[:, None] == ids[None], np.array(same_digest))
    batch = next(iterate_batches(dataset, SETTINGS))
    assert batch.image_ids is not None
    assert np.array_equal(batch.image_ids, dataset.image_ids[batch.rows])


def test_crops_of_pictures_in_memory_are_as_sharp_as_those_of_files(tmp_path: Path) -> None:
    """Fine stripes: a picture that was made small first has lost them."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = stripes[:, 2::8] = stripes[:, 3::8] = 255
    encoded = io.BytesIO()
    Image.fromarray(stripes).save(encoded, "PNG")
    write_foreign(tmp_path / "0.tar", [("a.png", encoded.getvalue()), ("a.txt", b"stripes")])
    run = RunDir.create(tmp_path / "run")
    import_shards([str(tmp_path / "0.tar")], run)
    write_human_manifest(run)
    quarter = [View(0.25, 0.25, 0.5, 0.5)]
    row = np.array([0])
    from_file = read_pairs([run], image_size_px=16, memory_limit_bytes=0).read_pixels(row, quarter).astype(int)
    held = read_pairs([run], image_size_px=16, smallest_crop=0.25)
    assert held.pictures.num_bytes_decoded == 32 * 32 * 3
    assert held.pictures.in_memory
    shrunken = read_pairs([run], image_size_px=16)
    held.open()
    shrunken.open()
    error = np.abs(held.read_pixels(row, quarter) - from_file).mean()
    assert error < 0.3 * np.abs(shrunken.read_pixels(row, quarter) - from_file).mean()
    whole = read_pairs([run], image_size_px=16, memory_limit_bytes=0).read_pixels(row, None).astype(int)
    assert held.read_pixels(row, None).shape == (1, 16, 16, 3)
    assert np.abs(held.read_pixels(row, None) - whole).mean() < 12


def test_a_run_that_keeps_nothing_adds_nothing(run: RunDir, tmp_path: Path) -> None:
    empty = small_models.save_run(tmp_path / "empty", [3], drop_every=1)
    dataset = read_pairs([empty.path, run.path], image_size_px=16, run_weights=(2.0, 1.0))
    assert sorted(dataset.order(0, 0).tolist()) == list(range(len(read_pairs([run.path], image_size_px=16).keys)))


def test_an_image_shown_twice_in_an_epoch_gets_another_draw(tmp_path: Path) -> None:
    run = small_models.save_run(tmp_path / "run", [40])
    dataset = read_pairs([run.path], image_size_px=16, run_weights=(2.0,))
    stream = iterate_batches(dataset, TrainSettings(batch_size=40))
    batches = [next(stream), next(stream)]
    seen = Counter((key, text) for batch in batches for key, text in zip(batch.keys, batch.texts, strict=True))
    assert Counter(key for key, _ in seen.elements()) == Counter(dict.fromkeys(dataset.keys, 2))
    both = sum(len({text for k, text in seen if k == key}) == 2 for key in dataset.keys)
    assert 8 <= both <= 32, "two captions each: about half of the images show both"


def test_a_sample_is_named_with_its_run_where_there_are_several(run: RunDir, tmp_path: Path) -> None:
    other = small_models.save_run(tmp_path / "other", [5])
    alone = next(iterate_batches(read_pairs([run], image_size_px=16), SETTINGS))
    assert alone.places == alone.keys
    dataset = read_pairs([run, other], image_size_px=16)
    both = next(iterate_batches(dataset, replace(SETTINGS, batch_size=len(dataset.keys))))
    assert both.rows is not None
    first_of_other = len(read_pairs([run], image_size_px=16).keys)
    for row, key, place in zip(both.rows, both.keys, both.places, strict=True):
        assert place == f"{key} of {other.path if row >= first_of_other else run.path}"


def test_the_digest_is_of_every_word_and_of_where_texts_end(tmp_path: Path) -> None:
    def digest(*captions: list[str]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        parts = [(f"{n}.json", json.dumps({"captions": texts}).encode()) for n, texts in enumerate(captions)]
        pictures = [(f"{n}.png", encode_picture(n)) for n in range(len(captions))]
        write_foreign(folder / "0.tar", sorted(parts + pictures))
        run = RunDir.create(folder / "run")
        import_shards([str(folder / "0.tar")], run)
        write_human_manifest(run)
        return runs_digest([run])

    first = digest(["ab", "c"], ["d"])
    assert digest(["ab", "c"], ["d"]) == first
    assert len({first, digest(["a", "bc"], ["d"]), digest(["ab"], ["c", "d"]), digest(["xb", "c"], ["d"])}) == 4


def test_draws_are_those_of_one_process_and_of_no_other_step() -> None:
    whole = Draws(5, 7).uniform(2, 12)
    parts = [Draws(5, 7, ranks=Ranks(rank, 3)).uniform(2, 4) for rank in range(3)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    others = [Draws(6, 7), Draws(5, 8), Draws(5, 7, part=1)]
    assert not any(torch.equal(other.uniform(2, 12), whole) for other in others)
    dropout = []
    for rank in range(2):
        Draws(5, 7, ranks=Ranks(rank, 2)).reseed()
        dropout.append(torch.rand(4))
    assert not torch.equal(*dropout)
