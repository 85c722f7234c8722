"""The least time a pass over a shard could take: the operations its models do, over what the processor can do.

    python -m benchmarks.floor CASE_AS_JSON        (prints JSON)

In: a `Case`. Out: GFLOP of one pass, counted by torch on the plain (not packed) layers of the same models, and the
highest GFLOP/s of packed linear layers at the sizes of BLIP's image encoder. Decoding of pictures, tokenizers and
what is not a matrix product count as nothing.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils import flop_counter

from benchmarks.curation import our_models_alone
from benchmarks.sides import Case
from capfilt.models.packed import PackedLinear

_ROWS = 8 * 577
_SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
_REPETITIONS = 8


@torch.inference_mode()
def measure_peak(dtype: torch.dtype) -> float:
    """GFLOP/s, the best of several shapes and repetitions."""
    best = 0.0
    for width, out in _SHAPES:
        layer, x = PackedLinear(torch.nn.Linear(width, out).to(dtype)), torch.randn(_ROWS, width).to(dtype)
        layer(x)
        for _ in range(_REPETITIONS):
            start = time.perf_counter()
            layer(x)
            best = max(best, 2 * _ROWS * width * out / (time.perf_counter() - start) / 1e9)
    return best


def count_gflop(case: Case) -> float:
    """Of one pass over the shard."""
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word on Intel's GPUs
        with torch.backends.mkldnn.flags(enabled=False):  # layers are not packed
            work = our_models_alone(case)
            with flop_counter.FlopCounterMode(display=False, custom_mapping={flash: _attention_flop}) as counter:
                work()
    return counter.get_total_flops() / 1e9


def _attention_flop(query: Any, key: Any, value: Any, *_: object, out_shape: Any = None, **__: object) -> int:
    """Two products: scores and weighted values."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    asked = Case(**options | {"models": Path(options["models"])})
    peak = measure_peak(asked.torch_dtype)
    print(json.dumps({"gflop": count_gflop(asked), "peak_gflop_per_s": peak}))
