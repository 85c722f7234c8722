"""Where a model runs, in which precision, and on how many images at a time.

In: settings' words. Out: torch's device and dtype, and a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from capfilt.errors import UsageError
from capfilt.settings import DEVICES
from capfilt.settings.checks import not_one_of

DEFAULT_BATCH_SIZE = 32
"""On a CPU, where larger batches gain nothing."""
LARGEST_BATCH_SIZE = 256
_SHARE_OF_FREE_MEMORY = 0.25  # three models may work side by side
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

Part = TypeVar("Part")

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The torch device of a setting; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises UsageError for a name that torch does not know, and for a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{not_one_of('device', name, DEVICES)} One of several is named cuda:1.") from None
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    has_it = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type)
    if has_it is not None and not has_it():
        raise UsageError(f"This machine has no {device.type} device that torch can use. Give --device cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a setting, for training; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _TORCH_DTYPES[name]


def choose_fast_dtype(name: str, device: torch.device) -> torch.dtype:
    """`choose_dtype`, but `auto` is bfloat16 on a CPU that is fast at it: one with AVX512_BF16 or AMX."""
    if name == "auto" and device.type == "cpu" and _has_bfloat16_instructions():
        return torch.bfloat16
    return choose_dtype(name, device)


def choose_batch_size(wanted: int | None, device: torch.device, bytes_per_image: int) -> int:
    """Images at a time: as wanted, else DEFAULT_BATCH_SIZE, else on a GPU what fits into a part of its free memory.

    Call it when the model is loaded. It is a rough estimate, and may be too much beside other models:
    `curate.shard_pass` halves a batch that does not fit. Apple's GPUs do not say what is free and get the default.
    """
    if wanted is not None:
        return wanted
    if device.type != "cuda":
        return DEFAULT_BATCH_SIZE
    free, _ = torch.cuda.mem_get_info(device)
    return fit_batch(int(free * _SHARE_OF_FREE_MEMORY), bytes_per_image)


def fit_batch(num_bytes: int, bytes_per_image: int) -> int:
    """The largest power of two of images that fit, at least 1 and at most LARGEST_BATCH_SIZE."""
    fitting = max(1, min(LARGEST_BATCH_SIZE, num_bytes // bytes_per_image))
    return 1 << (fitting.bit_length() - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had not the memory for what was asked; not all of torch's ways to say so are one class."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def in_parts(compute: Callable[[slice], Part], start: int, end: int) -> list[Part]:
    """What `compute` gives for start to end, in halves of halves where the device has not the memory for the whole."""
    try:
        return [compute(slice(start, end))]
    except RuntimeError as error:
        if end - start <= 1 or not is_out_of_memory(error):
            raise
    middle = (start + end) // 2  # outside the except clause, which would keep the failed tensors alive
    return in_parts(compute, start, middle) + in_parts(compute, middle, end)


def describe_computing(dtype: torch.dtype, device: torch.device) -> str:
    """For people: `bfloat16 on cpu`."""
    return f"{name_dtype(dtype)} on {device.type}"


def name_dtype(dtype: torch.dtype) -> str:
    """As settings and model files name it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _has_bfloat16_instructions() -> bool:
    """Without such instructions bfloat16 is computed by detours, slower than float32."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.cpu, "get_capabilities")):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
