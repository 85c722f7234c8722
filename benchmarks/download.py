"""The guarded download beside plain img2dataset, on the same site on loopback: images a second, and memory.

    python -m benchmarks.download [--urls 6000] [--rounds 3] [--processes 2] [--threads 32]

In: nothing. A server in a process of its own answers with photographs-like JPEGs of 240 to 1,600 pixels, made
beforehand; the two sides take turns, each as its user starts it, with equal settings (WebDataset shards of 1,000,
shorter edge 512, quality 95, sha256). Out: the ratio of images a second, start and end of the process included, and
the peaks of memory (proportional set size of all processes of a side).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

GOAL = 0.9
SIZES_PX = ((240, 320), (480, 640), (768, 1024), (1200, 1600), (600, 450))
POLL_SECONDS = 0.2


# --- the site -----------------------------------------------------------------------------------------------


def make_pictures(num: int = 40) -> list[bytes]:
    """JPEGs of coarse noise over a gradient: about as many bytes for each pixel as photographs have."""
    rng, pictures = np.random.default_rng(0), []
    for number in range(num):
        height, width = SIZES_PX[number % len(SIZES_PX)]
        coarse = rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=int)
        picture = Image.fromarray(np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8))
        with tempfile.SpooledTemporaryFile() as file:
            picture.save(file, "JPEG", quality=85)
            file.seek(0)
            pictures.append(file.read())
    return pictures


def serve(port: Connection) -> None:
    """Answer every request, the n-th address with picture n modulo their number."""
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(picture) + picture
        for picture in make_pictures()
    ]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, ValueError):
            request = await reader.readuntil(b"\r\n\r\n")
            writer.write(answers[int(request.split(b"/")[1].split(b".")[0]) % len(answers)])
            await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


# --- the sides ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What both sides download, and how."""

    table: Path
    num_processes: int
    num_threads: int


def capfilt_command(job: Job, output: Path) -> list[str]:
    """Our side."""
    options = {"--num-processes": job.num_processes, "--num-threads": job.num_threads, "--samples-per-shard": 1000}
    words = [str(word) for pair in options.items() for word in pair]
    return [
        sys.executable,
        "-m",
        "capfilt",
        "download",
        str(job.table),
        str(output),
        "--allow-private-addresses",
        *words,
    ]


def img2dataset_command(job: Job, output: Path) -> list[str]:
    """Plain img2dataset."""
    options = {
        "url_list": job.table, "input_format": "parquet", "url_col": "url", "caption_col": "text",
        "output_format": "webdataset", "output_folder": output, "processes_count": job.num_processes,
        "thread_count": job.num_threads, "number_sample_per_shard": 1000, "image_size": 512,
        "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "encode_quality": 95, "timeout": 30,
        "enable_wandb": False,
    }  # fmt: skip
    program = Path(sys.executable).parent / "img2dataset"
    return [str(program), *(f"--{name}={value}" for name, value in options.items())]


SIDES: dict[str, Callable[[Job, Path], list[str]]] = {"capfilt": capfilt_command, "img2dataset": img2dataset_command}


@dataclass
class Timed:
    """What a side took, round by round."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)


def memory_mib(process: psutil.Process) -> float:
    """Proportional set size of a process and all that it started."""
    total = 0.0
    with suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += one.memory_full_info().pss / 2**20
    return total


def time_side(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB) of a whole process. Raises RuntimeError where it fails."""
    started, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, memory_mib(watched))
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - started
        if process.returncode:
            output.seek(0)
            raise RuntimeError(output.read().decode("utf-8", "replace")[-2000:])
    return seconds, peak


def count_pictures(output: Path) -> int:
    """Rows with a picture, by the Parquet files that both sides write."""
    files = [*output.glob("*.parquet"), *output.glob("shards/*.parquet")]
    return sum(pq.read_table(file, columns=["status"])["status"].to_pylist().count("success") for file in files)


def main() -> None:
    """Time both sides and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--urls", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=32)
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    found = {name: Timed() for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "urls.parquet"
        urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(options.urls)]
        pq.write_table(pa.table({"url": urls, "text": [f"picture {number}" for number in range(options.urls)]}), table)
        for number in range(options.rounds):
            for name, command in SIDES.items():
                output = Path(folder) / name
                seconds, peak = time_side(command(Job(table, options.processes, options.threads), output))
                num = count_pictures(output)
                if num != options.urls:
                    raise RuntimeError(f"{name} has {num} pictures of {options.urls}")
                shutil.rmtree(output)
                found[name].seconds.append(seconds)
                found[name].peak_mib.append(peak)
                print(
                    f"round {number + 1}: {name:<12} {seconds:6.1f} s "
                    f"{options.urls / seconds:7.1f} images/s {peak:7.0f} MiB"
                )
    server.terminate()
    medians = {name: statistics.median(timed.seconds) for name, timed in found.items()}
    peaks = {name: statistics.median(timed.peak_mib) for name, timed in found.items()}
    print(f"images a second: {medians['img2dataset'] / medians['capfilt']:.2f} times img2dataset's (goal {GOAL}); "
          f"memory: {peaks['capfilt'] / peaks['img2dataset']:.2f} times its (goal 1)")  # fmt: skip


if __name__ == "__main__":
    main()
