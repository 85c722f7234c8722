"""A small run with every stage, committed by the real protocol, for the tests to damage and interrupt."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from capfilt.data.commit import commit_stage, input_digest, read_table
from capfilt.data.reasons import Quarantined
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.tars import write_tar

EXTENSIONS = ("jpg", "png", "webp")
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def encoded_image(seed: int, ext: str = "jpg", size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, FORMATS[ext])
    return buffer.getvalue()


def commit_shard(
    run: RunDir, shard: str = "00000", num_samples: int = 3, *, num_shards: int = 1, first_image: int = 0
) -> None:
    """`num_samples` samples and one row that failed."""
    keys = [f"{shard}{number:04d}" for number in range(num_samples)]
    exts = [EXTENSIONS[number % 3] for number in range(num_samples)]
    images = [encoded_image(int(key) + first_image, ext) for key, ext in zip(keys, exts, strict=True)]
    captions = [f"web caption of {key}" if number % 3 else "" for number, key in enumerate(keys)]
    members = []
    for key, ext, image, caption in zip(keys, exts, images, captions, strict=True):
        metadata = json.dumps({"key": key}).encode()
        members += [(f"{key}.{ext}", image), (f"{key}.txt", caption.encode()), (f"{key}.json", metadata)]
    with run.new_staging() as staging:
        tar = staging / "shard.tar"
        index = write_tar(tar, members)[::3]
        rows = [
            dict(key=key, url=f"http://x/{key}", caption=caption, status="success", width=24, height=16)
            | dict(original_width=48, original_height=32, sha256=hashlib.sha256(image).hexdigest())
            | dict(image_offset=member.offset, image_length=member.length, image_ext=ext)
            for key, ext, image, caption, member in zip(keys, exts, images, captions, index, strict=True)
        ]
        bad = f"{shard}9999"
        rows.append(dict(key=bad, url="http://x/y", caption="z", status="failed_to_download", reason="timeout"))
        commit_stage(
            run, "shards", shard, pa.Table.from_pylist(rows, schema=SCHEMAS["shards"]),
            fields={"image_size_px": 64}, input_digest="table", rows_in=num_samples + 1, tar=tar,
            quarantine=[Quarantined(key=bad, reason="timeout", detail="30 s")],
            extra={"num_shards": num_shards, "source_rows": num_shards * (num_samples + 1)},
        )  # fmt: skip


def commit_captions(run: RunDir, shard: str = "00000", *, seed: int = 0, replace: bool = False) -> None:
    """Three captions for each sample but the last, which goes to quarantine."""
    keys = _kept(run, shard)
    rows = [dict(key=key, caption_index=n, text=f"{seed} {key} {n // 2}") for key in keys[:-1] for n in range(3)]
    commit_stage(
        run, "captions", shard, pa.Table.from_pylist(rows, schema=SCHEMAS["captions"]), fields={"seed": seed},
        input_digest=input_digest(run, "captions", shard), rows_in=len(keys), replace=replace,
        quarantine=[Quarantined(key=keys[-1], reason="scoring_failed")],
    )  # fmt: skip


def commit_clip(run: RunDir, shard: str = "00000", *, replace: bool = False) -> None:
    captions = read_table(run.read_file("captions", shard)).to_pylist()
    webs = {row["key"]: row["caption"] for row in read_table(run.stage_file("shards", shard)).to_pylist()}
    rows = []
    for row in captions:
        if row["caption_index"] == 0:
            rows.append(dict(key=row["key"], caption_index=-1, source="web", text=webs[row["key"]]))
        is_copy = row["caption_index"] == 1
        rank = None if is_copy else {0: 1, 2: 2}[row["caption_index"]]
        facts = dict(clip_score=0.75 - row["caption_index"] / 4 if not is_copy else 0.75, rank=rank)
        rows.append({**row, "source": "synthetic", "duplicate_of": 0 if is_copy else None, **facts})
    _commit(run, "clip", shard, rows, {"keep": 1}, replace)


def commit_itm(run: RunDir, shard: str = "00000", *, lost: int = 0, replace: bool = False) -> None:
    """Scores of the web caption and the best one; the first `lost` samples go to quarantine."""
    clip = read_table(run.read_file("clip", shard)).to_pylist()
    quarantined = list(dict.fromkeys(row["key"] for row in clip))[:lost]
    rows = [
        dict(key=row["key"], caption_index=row["caption_index"], itm_score=0.9 if row["text"] else None)
        for row in clip
        if row["key"] not in quarantined and (row["source"] == "web" or row["rank"] == 1)
    ]
    _commit(run, "itm", shard, rows, {"first_token": "enc"}, replace, quarantined)


def commit_manifest(run: RunDir, shard: str = "00000", *, threshold: float = 0.5, replace: bool = False) -> None:
    clip = read_table(run.read_file("clip", shard)).to_pylist()
    itm = {(r["key"], r["caption_index"]): r["itm_score"] for r in read_table(run.read_file("itm", shard)).to_pylist()}
    samples = {row["key"]: row for row in read_table(run.stage_file("shards", shard)).to_pylist()}
    rows = []
    for row in clip:
        if row["key"] not in {key for key, _ in itm}:
            continue
        score = itm.get((row["key"], row["caption_index"]))
        reason = "duplicate" if row.pop("duplicate_of") is not None else "low_clip" if row["rank"] == 2 else None
        if not row["text"]:
            reason = "empty"
        elif reason is None and score < threshold:
            reason = "low_itm"
        facts = {name: samples[row["key"]][name] for name in ("url", "width", "height", "sha256")}
        rows.append(
            {
                **row,
                **facts,
                "shard": shard,
                "itm_score": score,
                "kept": reason is None,
                "drop_reason": reason,
            }
        )
    _commit(run, "manifest", shard, rows, {"threshold": threshold}, replace)


def commit_all(run: RunDir, num_shards: int = 2, num_samples: int = 3) -> None:
    for number in range(num_shards):
        shard = f"{number:05d}"
        commit_shard(run, shard, num_samples, num_shards=num_shards)
        commit_captions(run, shard)
        commit_clip(run, shard)
        commit_itm(run, shard)
        commit_manifest(run, shard)


def _kept(run: RunDir, shard: str) -> list[str]:
    rows = read_table(run.stage_file("shards", shard)).to_pylist()
    return [row["key"] for row in rows if row["status"] == "success"]


def _commit(
    run: RunDir,
    stage: str,
    shard: str,
    rows: list[dict],
    fields: dict,
    replace: bool,
    lost: Sequence[str] = (),
) -> None:
    commit_stage(
        run, stage, shard, pa.Table.from_pylist(rows, schema=SCHEMAS[stage]), fields=fields,
        input_digest=input_digest(run, stage, shard), rows_in=len({row["key"] for row in rows}) + len(lost),
        quarantine=[Quarantined(key=key, reason="scoring_failed") for key in lost], replace=replace,
    )  # fmt: skip


@pytest.fixture
def stages() -> SimpleNamespace:
    """Functions that commit a stage of a shard."""
    return SimpleNamespace(
        shard=commit_shard, captions=commit_captions, clip=commit_clip, itm=commit_itm,
        manifest=commit_manifest, everything=commit_all, image=encoded_image,
    )  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDir]:
    """Make a run with every stage of `num_shards` shards."""

    def make(num_shards: int = 2, num_samples: int = 3, name: str = "run") -> RunDir:
        run = RunDir.create(tmp_path / name)
        commit_all(run, num_shards, num_samples)
        return run

    return make
