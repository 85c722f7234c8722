"""Reading shards: everything that was committed and nothing else; plain webdataset opens them."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable

import pytest
import webdataset

from capfilt.data.commit import read_table
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_sample, read_samples
from capfilt.errors import CorruptionError, UsageError


def test_samples_are_those_committed(make_run: Callable[..., RunDir]) -> None:
    run = make_run(1, 5)
    rows = {row["key"]: row for row in read_table(run.stage_file("shards", "00000")).to_pylist()}
    samples = list(read_samples(run, "00000"))
    assert [sample.key for sample in samples] == [key for key, row in rows.items() if row["status"] == "success"]
    for sample in samples:
        row = rows[sample.key]
        assert hashlib.sha256(sample.image).hexdigest() == sample.sha256 == row["sha256"]
        assert (sample.web_caption, sample.url) == (row["caption"], row["url"])
        assert (sample.width, sample.height) == (24, 16)
        assert read_sample(run, "00000", sample.key) == sample
    chosen = {samples[1].key, samples[4].key}
    assert [sample.key for sample in read_samples(run, "00000", chosen)] == sorted(chosen)
    with pytest.raises(UsageError, match="no sample with the key 'x'"):
        read_sample(run, "00000", "x")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files to the garbage collector
def test_plain_webdataset_opens_them(make_run: Callable[..., RunDir]) -> None:
    run = make_run(2, 4)
    urls = [str(run.tar_path(shard)) for shard in run.shard_names()]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    samples = [sample for shard in run.shard_names() for sample in read_samples(run, shard)]
    found = list(dataset)
    del dataset
    gc.collect()
    assert [item["__key__"] for item in found] == [sample.key for sample in samples]
    for item, sample in zip(found, samples, strict=True):
        assert item["txt"] == sample.web_caption
        assert item["json"]["key"] == sample.key
        image = next(item[ending] for ending in ("jpg", "png", "webp") if ending in item)
        assert image.shape == (sample.height, sample.width, 3)


def test_a_flip_anywhere_in_the_tar_is_found(make_run: Callable[..., RunDir]) -> None:
    run = make_run(1, 3)
    path = run.tar_path("00000")
    data = path.read_bytes()
    for position in range(0, len(data), 197):
        flipped = bytearray(data)
        flipped[position] ^= 0x04
        path.write_bytes(flipped)
        with pytest.raises(CorruptionError, match=r"00000\.tar is damaged"):
            list(read_samples(run, "00000"))


def test_a_cut_or_missing_tar_is_found(make_run: Callable[..., RunDir]) -> None:
    run = make_run(1, 3)
    path = run.tar_path("00000")
    data = path.read_bytes()
    for end in range(0, len(data), 512):
        path.write_bytes(data[:end])
        with pytest.raises(CorruptionError, match="were committed"):
            list(read_samples(run, "00000"))
    path.unlink()
    with pytest.raises(CorruptionError, match="gone"):
        list(read_samples(run, "00000"))


def test_no_image_of_another_sample_is_given_out(make_run: Callable[..., RunDir]) -> None:
    """Two images of one length that changed places keep every header and every size."""
    run = make_run(1, 6)
    samples = list(read_samples(run, "00000"))
    path = run.tar_path("00000")
    data = path.read_bytes()
    first = samples[0].image
    path.write_bytes(data.replace(first, bytes(len(first))))
    with pytest.raises(CorruptionError, match="digest"):
        next(read_samples(run, "00000"))
    with pytest.raises(CorruptionError, match="digest"):
        read_sample(run, "00000", samples[0].key)
    assert read_sample(run, "00000", samples[1].key) == samples[1]
