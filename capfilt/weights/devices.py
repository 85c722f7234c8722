"""Where a model runs and in which precision. In: settings' words. Out: torch's device and dtype."""

from __future__ import annotations

import torch

from capfilt.errors import UsageError
from capfilt.settings import DEVICES

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The torch device of a setting; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises UsageError for a name that torch does not know, and for a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        known = ", ".join(DEVICES)
        raise UsageError(f"device is {name!r}; expected one of {known}, or one of several (cuda:1).") from None
    has_it = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type)
    if has_it is not None and not has_it():
        raise UsageError(f"This machine has no {device.type} device that torch can use. Give --device cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a setting; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _TORCH_DTYPES[name]


def choose_inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """`choose_dtype`, but `auto` is bfloat16 on a CPU that is fast at it: one with AVX512_BF16 or AMX."""
    if name == "auto" and device.type == "cpu" and _multiplies_bfloat16():
        return torch.bfloat16
    return choose_dtype(name, device)


def describe_computing(dtype: torch.dtype, device: torch.device) -> str:
    """For people: `bfloat16 on cpu`."""
    return f"{str(dtype).removeprefix('torch.')} on {device.type}"


def _multiplies_bfloat16() -> bool:
    """Without such instructions bfloat16 is computed by detours, slower than float32."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.cpu, "get_capabilities")):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
