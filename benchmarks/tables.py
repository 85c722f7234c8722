"""`stats`, `select` and `verify` of a synthetic run of ten million pairs: seconds and peaks of memory, whole commands.

    python -m benchmarks.tables [--pairs 10000000] [--rounds 1] [--run build/bench-tables]

In: nothing. The run is made once, by the real commit protocol, and stays for the next time: shards of 910 samples,
each with its web caption and ten synthetic ones of words drawn by Zipf's law, CLIP scores and ranks, and ITM scores of
the web caption and the top two. Out: a line for each command. Peaks are of resident memory of its processes together.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from capfilt.curation.selection import commit_manifest, manifest_fields
from capfilt.data.commit import commit_stage, input_digest
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.tars import write_tar

NUM_SAMPLES, NUM_CAPTIONS, KEEP = 910, 10, 2
NUM_WORDS, ZIPF_EXPONENT = 20_000, 1.3
SELECTION = {"threshold": 0.5, "keep": KEEP, "include_web": False}
OTHER_THRESHOLDS = (0.6, 0.4)
"""That the rounds select by, in turn."""
GOALS = {"stats": (10.0, 1000.0), "select": (20.0, 1000.0), "verify": (None, 1000.0)}
"""Command → seconds and MB at ten million pairs."""


@dataclass(frozen=True)
class Words:
    """What texts are drawn from."""

    words: pa.Array
    shares: np.ndarray

    @classmethod
    @lru_cache
    def draw(cls) -> Words:
        """Letters at random; a few words are not ASCII."""
        rng = np.random.default_rng(0)
        letters = np.array(list("aaabcdeeefghiiijklmnooopqrstuuvwxyz"))
        words = ["".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(NUM_WORDS)]
        words[500::500] = [f"{word}é" for word in words[500::500]]
        shares = 1 / np.arange(1, NUM_WORDS + 1) ** ZIPF_EXPONENT
        return cls(pa.array(words), shares / shares.sum())

    def texts(self, rng: np.random.Generator, num: int) -> pa.Array:
        """So many texts of five to fifteen words."""
        offsets = np.concatenate([[0], rng.integers(5, 16, num).cumsum()])
        drawn = self.words.take(pa.array(rng.choice(NUM_WORDS, offsets[-1], p=self.shares)))
        return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), drawn), " ")


def make_run(path: Path, num_pairs: int) -> None:
    """The run with every stage, by as many processes as there are cores."""
    run = RunDir.create(path)
    num_shards = -(-num_pairs // (NUM_SAMPLES * (NUM_CAPTIONS + 1)))
    missing = sorted({f"{number:05d}" for number in range(num_shards)} - set(run.committed("manifest")))
    with run.lock(), multiprocessing.get_context("spawn").Pool() as pool:
        for done, _ in enumerate(pool.imap_unordered(_Maker(path, num_shards), missing), start=1):
            if done % 100 == 0:
                print(f"{done} of {len(missing)} shards made", flush=True)


@dataclass
class _Maker:
    """Makes a shard with all its stages."""

    path: Path
    num_shards: int

    def __call__(self, shard: str) -> None:
        run, rng, words = RunDir.open(self.path), np.random.default_rng(int(shard)), Words.draw()
        keys = pa.array([f"{shard}{number:04d}" for number in range(NUM_SAMPLES)])
        web = words.texts(rng, NUM_SAMPLES)
        self._commit_shard(run, shard, keys, web)
        num_texts = NUM_CAPTIONS + 1
        key = keys.take(pa.array(np.repeat(np.arange(NUM_SAMPLES), num_texts)))
        index = np.tile(np.arange(-1, NUM_CAPTIONS, dtype=np.int32), NUM_SAMPLES)
        synthetic = words.texts(rng, NUM_SAMPLES * num_texts)
        source = pa.array(["synthetic", "web"]).take(pa.array((index < 0).astype(np.int64)))
        text = pc.if_else(
            pa.array(index < 0), web.take(pa.array(np.repeat(np.arange(NUM_SAMPLES), num_texts))), synthetic
        )
        scores = rng.uniform(0.05, 0.4, (NUM_SAMPLES, num_texts)).astype(np.float32)
        order = (-scores[:, 1:]).argsort(axis=1, kind="stable").argsort(axis=1) + 1
        ranks = np.concatenate([np.zeros((NUM_SAMPLES, 1), np.int64), order], axis=1).ravel()
        rank = pa.array(ranks, pa.int32(), mask=index < 0)
        nothing = pa.nulls(len(index), pa.int32())
        clip = pa.table([key, index, source, text, scores.ravel(), rank, nothing], schema=SCHEMAS["clip"])
        captions = clip.filter(pc.field("caption_index") >= 0).select(["key", "caption_index", "text"])
        seen = clip.filter(pa.array((index < 0) | (ranks <= KEEP)))
        itm_scores = rng.beta(0.6, 0.6, seen.num_rows).astype(np.float32)
        itm = pa.table([seen["key"], seen["caption_index"], itm_scores], schema=SCHEMAS["itm"])
        for stage, table, fields in (
            ("captions", captions, {}), ("clip", clip, {"keep": KEEP, "include_web": False}), ("itm", itm, {}),
        ):  # fmt: skip
            digest = input_digest(run, stage, shard)
            commit_stage(
                run, stage, shard, table, fields=fields, input_digest=digest, rows_in=NUM_SAMPLES, replace=True
            )
        commit_manifest(run, shard, manifest_fields(**SELECTION))

    def _commit_shard(self, run: RunDir, shard: str, keys: pa.Array, captions: pa.Array) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), "teal").save(buffer, "JPEG")
        picture, digest = buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()
        members: list[tuple[str, bytes]] = []
        for key, caption in zip(keys.to_pylist(), captions.to_pylist(), strict=True):
            members += [(f"{key}.jpg", picture), (f"{key}.txt", caption.encode()), (f"{key}.json", b"{}")]
        with run.new_staging() as staging:
            index = write_tar(staging / "shard.tar", members)[::3]
            rows = {
                "key": keys, "caption": captions, "url": [f"https://pictures.example/{key}.jpg" for key in keys],
                "status": ["success"] * NUM_SAMPLES, "sha256": [digest] * NUM_SAMPLES,
                "image_offset": [member.offset for member in index], "image_ext": ["jpg"] * NUM_SAMPLES,
                "image_length": [member.length for member in index],
            }  # fmt: skip
            sizes = [16] * NUM_SAMPLES
            rows |= dict.fromkeys(("width", "height", "original_width", "original_height"), sizes)
            table = pa.table(
                [rows.get(name, [None] * NUM_SAMPLES) for name in SCHEMAS["shards"].names], SCHEMAS["shards"]
            )
            commit_stage(
                run, "shards", shard, table, fields={}, input_digest="table", rows_in=NUM_SAMPLES, replace=True,
                tar=staging / "shard.tar",
                extra={"num_shards": self.num_shards, "source_rows": self.num_shards * NUM_SAMPLES},
            )  # fmt: skip


def time_command(*arguments: object) -> tuple[float, float]:
    """Seconds and peak of memory in MB of a whole command."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "capfilt", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak, watched = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.Error):
            together = [watched, *watched.children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in together) / 1e6)
        time.sleep(0.2)  # looking costs time itself
    assert process.stderr is not None
    if process.returncode:
        raise RuntimeError(process.stderr.read().decode("utf-8", "replace")[-2000:])
    return time.perf_counter() - began, peak


def main() -> None:
    """Make the run where it is not there, then time each command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run", type=Path, default=Path("build/bench-tables"))
    parser.add_argument("--only", default=",".join(GOALS), help="some of " + ", ".join(GOALS))
    asked = parser.parse_args()
    make_run(asked.run, asked.pairs)
    for number in range(asked.rounds):
        threshold = OTHER_THRESHOLDS[number % 2]
        commands = {
            "stats": ("stats", asked.run, "--json"), "select": ("select", asked.run, "--threshold", threshold),
            "verify": ("verify", asked.run),
        }  # fmt: skip
        for name in asked.only.split(","):
            seconds, peak = time_command(*commands[name])
            goal_seconds, goal_mb = GOALS[name]
            goal = f"goal {goal_seconds:g} s, {goal_mb:,.0f} MB" if goal_seconds else f"goal {goal_mb:,.0f} MB"
            print(f"{name:8} {seconds:6.1f} s {peak:8,.0f} MB   ({goal} for ten million pairs)", flush=True)


if __name__ == "__main__":
    main()
