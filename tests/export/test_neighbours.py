"""The programs for which exports are written read them: webdataset, wids, open_clip_train, datasets, pycocotools, …"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.data.annotations import read_captioned_images
from capfilt.data.manifest import SCHEMAS, read_manifest
from capfilt.data.rundir import RunDir
from tests import factories
from tests.cli.conftest import capfilt
from tests.data import conftest as small
from tests.export.runs import kept_of, make_scored_run, pictures_of

PER_SHARD = 9


@pytest.fixture(scope="module")
def tars(run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Curated shards of nine samples; 21 images are kept."""
    folder = tmp_path_factory.mktemp("tars") / "curated"
    done = capfilt("export", run.path, "-o", folder, "--format", "webdataset", "--samples-per-shard", PER_SHARD)
    assert done.code == 0, done.err
    return folder


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files to the garbage collector
def test_webdataset(run: RunDir, tars: Path) -> None:
    import webdataset

    kept, pictures = kept_of(run), pictures_of(run)
    dataset = webdataset.WebDataset(str(tars / "{00000..00002}.tar"), shardshuffle=False)
    found = list(dataset)
    decoded = list(webdataset.WebDataset(str(tars / "{00000..00002}.tar"), shardshuffle=False).decode("pil"))
    del dataset
    gc.collect()
    assert [sample["__key__"] for sample in found] == list(kept)
    for sample, plain in zip(found, decoded, strict=True):
        key = sample["__key__"]
        image = next(ending for ending in ("jpg", "png", "webp") if ending in sample)
        assert sample[image] == pictures[key]
        assert Image.open(io.BytesIO(pictures[key])).format == {"jpg": "JPEG"}.get(image, image.upper())
        assert plain[image].size == (24, 16)
        assert plain["txt"] == kept[key][0]["text"]
        assert plain["json"]["captions"] == [row["text"] for row in kept[key]]
        assert plain["json"]["sources"] == [row["source"] for row in kept[key]]
        assert plain["json"]["itm_scores"] == pytest.approx([row["itm_score"] for row in kept[key]], rel=1e-7)
        assert plain["json"]["url"] == f"http://x/{key}"


def test_wids(run: RunDir, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path))
    import wids

    kept, pictures = kept_of(run), pictures_of(run)
    dataset = wids.ShardListDataset(str(tars / "shardindex.json"), transformations=[lambda sample: sample])
    assert len(dataset) == len(kept) == 21
    for number in (20, 0, 9, 8):
        sample, key = dataset[number], list(kept)[number]
        image = next(sample[ending] for ending in (".jpg", ".png", ".webp") if ending in sample)
        assert (sample["__key__"], image.read()) == (key, pictures[key])
        assert sample[".txt"].read().decode() == kept[key][0]["text"]
    dataset.close()


def test_open_clip_train(tars: Path, tmp_path: Path) -> None:
    """An epoch of a small CLIP; how many samples there are it reads in sizes.json."""
    factories.save_clip(tmp_path / "clip")
    done = subprocess.run(
        [sys.executable, "-m", "open_clip_train.main", "--train-data", str(tars / "{00000..00002}.tar"),
         "--dataset-type", "webdataset", "--model", f"local-dir:{tmp_path / 'clip'}", "--batch-size", "4",
         "--epochs", "1", "--workers", "1", "--warmup", "1", "--precision", "fp32", "--device", "cpu",
         "--log-every-n-steps", "1", "--logs", str(tmp_path / "logs"), "--name", "small"],
        capture_output=True, text=True, timeout=200, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    losses = [float(loss) for loss in re.findall(r"Contrastive_loss: (\S+)", said)]
    assert len(losses) == math.ceil(21 / 4), said[-3000:]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert "Handling webdataset error" not in said
    assert (tmp_path / "logs" / "small" / "checkpoints" / "epoch_1.pt").is_file()


def test_datasets(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    done = capfilt("export", run.path, "-o", tmp_path / "hf", "--format", "datasets", "--samples-per-shard", 8)
    assert done.code == 0, done.err
    kept, pictures = kept_of(run), pictures_of(run)
    cache = str(tmp_path / "cache")
    streamed = datasets.load_dataset(str(tmp_path / "hf"), split="train", streaming=True, cache_dir=cache)
    loaded = datasets.load_dataset(str(tmp_path / "hf"), split="train", cache_dir=cache)
    assert loaded.num_rows == len(kept)
    assert streamed.num_shards == 3
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded.features["itm_score"].dtype == "float32"
    for one, other, key in zip(streamed, loaded, kept, strict=True):
        assert one["key"] == other["key"] == key
        assert one["text"] == other["text"] == kept[key][0]["text"]
        assert one["texts"] == [row["text"] for row in kept[key]]
        expected = Image.open(io.BytesIO(pictures[key]))
        assert one["image"].tobytes() == other["image"].tobytes() == expected.tobytes()
    plain = loaded.cast_column("image", datasets.Image(decode=False))
    assert [row["bytes"] for row in plain["image"]] == [pictures[key] for key in kept]
    text = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "21 samples" in text


def test_datasets_reads_tars_of_one_picture_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader of WebDataset wants the same members in every sample."""
    import datasets

    monkeypatch.setattr(small, "EXTENSIONS", ("jpg",) * 3)
    run = make_scored_run(tmp_path / "run")
    assert capfilt("export", run.path).code == 0
    files = {"train": str(run.path / "curated" / "*.tar")}
    found = datasets.load_dataset(
        "webdataset", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    assert [sample["txt"] for sample in found] == [rows[0]["text"] for rows in kept_of(run).values()]


def test_pycocotools(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    done = capfilt("export", run.path, "-o", tmp_path / "coco", "--format", "coco")
    assert done.code == 0, done.err
    kept, pictures = kept_of(run), pictures_of(run)
    coco = COCO(str(tmp_path / "coco" / "annotations.json"))
    assert len(coco.getImgIds()) == len(kept)
    for image, key in zip(coco.loadImgs(coco.getImgIds()), kept, strict=True):
        assert (tmp_path / "coco" / "images" / image["file_name"]).read_bytes() == pictures[key]
        assert (image["width"], image["height"], image["key"]) == (24, 16, key)
        found = [annotation["caption"] for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))]
        assert found == [row["text"] for row in kept[key]]
    ours = read_captioned_images(tmp_path / "coco" / "annotations.json", tmp_path / "coco" / "images")
    assert [one.captions for one in ours] == [tuple(row["text"] for row in rows) for rows in kept.values()]
    assert [one.image.read() for one in ours if one.image] == [pictures[key] for key in kept]


def test_llava(run: RunDir, tmp_path: Path) -> None:
    """Read as LLaVA's dataset does: the first turn is the picture's, the file lies below the image folder."""
    done = capfilt("export", run.path, "-o", tmp_path / "llava", "--format", "llava")
    assert done.code == 0, done.err
    kept, pictures = kept_of(run), pictures_of(run)
    entries = json.loads((tmp_path / "llava" / "llava.json").read_text(encoding="utf-8"))
    assert [entry["id"] for entry in entries] == list(kept)
    for entry in entries:
        human, answer = entry["conversations"]
        assert (tmp_path / "llava" / "images" / entry["image"]).read_bytes() == pictures[entry["id"]]
        assert (human["from"], human["value"].count("<image>"), answer["from"]) == ("human", 1, "gpt")
        assert answer["value"] == kept[entry["id"]][0]["text"]


def test_img2dataset(run: RunDir, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns, beside the tars and with the pictures' bytes; and it takes the file of pairs as its list."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    from img2dataset.reader import Reader

    done = capfilt("export", run.path, "-o", tmp_path / "rows", "--format", "img2dataset")
    assert done.code == 0, done.err
    kept, pictures = kept_of(run), pictures_of(run)
    frame = pd.read_parquet(tmp_path / "rows" / "00000.parquet")
    assert list(frame["jpg"]) == [pictures[key] for key in kept]
    beside = pd.concat(pd.read_parquet(tars / f"{number:05d}.parquet") for number in range(3))
    for found in (frame, beside):
        assert list(found["key"]) == list(kept)
        assert list(found["caption"]) == [rows[0]["text"] for rows in kept.values()]
        assert set(found["status"]) == {"success"}
        assert set(zip(found["width"], found["height"], found["original_width"], strict=True)) == {(24, 16, 48)}
    done = capfilt("export", run.path, "-o", tmp_path / "pairs.parquet")
    assert done.code == 0, done.err
    assert pq.read_table(tmp_path / "pairs.parquet").equals(read_manifest([run], kept_only=True))
    (tmp_path / "lists").mkdir()
    reader = Reader(
        str(tmp_path / "pairs.parquet"), "parquet", "url", "text", None, None, [], 1000, [], str(tmp_path / "lists")
    )
    ((_, part),) = reader
    listed = pa.ipc.open_file(part).read_all().to_pylist()
    assert [(row["url"], row["caption"]) for row in listed] == [
        (row["url"], row["text"]) for row in read_manifest([run], kept_only=True).to_pylist()
    ]


def test_dropped_pairs_in_parquet(run: RunDir, tmp_path: Path) -> None:
    done = capfilt("export", run.path, "-o", tmp_path / "all.parquet", "--dropped", "--json")
    assert done.code == 0, done.err
    expected = read_manifest([run])
    assert pq.read_table(tmp_path / "all.parquet").equals(expected)
    assert done.json()["num_pairs"] == expected.num_rows
    counted = duckdb.sql(f"select drop_reason, count(*) from '{tmp_path}/all.parquet' group by 1").fetchall()
    assert dict(counted)[None] == done.json()["num_kept"] == len(read_manifest([run], kept_only=True))
    assert pq.read_schema(tmp_path / "all.parquet").names == SCHEMAS["manifest"].names
