"""data-juicer's captioning operator, timed in an environment of its own; imports neither capfilt nor its tests.

In: a BLIP captioner in transformers' layout, a folder of pictures, how many captions. Out, with `--passes`: a line of
JSON with the seconds of each pass and the versions; without: what `benchmarks.timing` asks of a side.

    PYTHON -m benchmarks.data_juicer CAPTIONER PICTURES [--num-captions 10] [--generate JSON] [--passes N]

`image_captioning_mapper` loads the class that the folder's config.json names, so it runs BLIP as it is. It takes the
pictures eight at a time, and for each caption it prepares and encodes them anew. It has no option for decoding: it
draws from the 50 likeliest tokens, 128 at most. Without `--generate` it is left like that; with it, `model.generate`
is called with those arguments in place of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("py-data-juicer", "torch", "transformers")
OPERATOR = "data_juicer.ops.mapper.image_captioning_mapper"


def build_pass(options: argparse.Namespace) -> Callable[[], list[str]]:
    """Load the model; what is returned reads every picture and gives all captions of all of them."""
    operator = importlib.import_module(OPERATOR).ImageCaptioningMapper(
        hf_img2seq=str(options.captioner), caption_num=options.num_captions, prompt=options.prompt,
        keep_candidate_mode="all", keep_original_sample=False, accelerator="cpu",
    )  # fmt: skip
    model: Any = importlib.import_module("data_juicer.utils.model_utils").get_model(operator.model_key)[0]
    if options.generate:
        generate = model.generate
        model.generate = lambda **asked: generate(**(asked | options.generate))
    place = importlib.import_module("data_juicer.utils.mm_utils").SpecialTokens.image
    pictures = [[str(path)] for path in sorted(options.pictures.glob("*.png"))]
    assert pictures, f"no .png in {options.pictures}"
    return lambda: operator.process({"text": [place] * len(pictures), "images": pictures})["text"]


def read_versions() -> dict[str, str]:
    """Of this environment."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def read_peak_mib() -> float:
    """As `benchmarks.timing` reads it, which this environment cannot import."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    """One pass to warm up, then as many as are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_juicer")
    parser.add_argument("captioner", type=Path, help="folder of a BLIP captioner, transformers' layout")
    parser.add_argument("pictures", type=Path, help="folder of .png files")
    parser.add_argument("--num-captions", type=int, default=10, help="of each picture")
    parser.add_argument("--prompt", default="a picture of", help="what the captions continue")
    parser.add_argument("--generate", type=json.loads, default={}, help="arguments of generate, as JSON")
    parser.add_argument("--passes", type=int, help="time so many, print JSON")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        work = build_pass(options)
        texts = work()

    def time_pass() -> float:
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            work()
        return time.perf_counter() - start

    if options.passes is None:
        print("ready", flush=True)
        for _ in sys.stdin:
            print(time_pass(), flush=True)
        print(read_peak_mib(), flush=True)
    else:
        seconds = [time_pass() for _ in range(options.passes)]
        print(json.dumps({"versions": read_versions(), "num_texts": len(texts), "seconds": seconds}))


if __name__ == "__main__":
    main()
