"""Devices and dtypes of settings."""

from __future__ import annotations

import pytest
import torch

from capfilt.errors import UsageError
from capfilt.weights.devices import (
    DEFAULT_BATCH_SIZE,
    LARGEST_BATCH_SIZE,
    choose_batch_size,
    choose_device,
    choose_dtype,
    choose_fast_dtype,
    fit_batch,
    in_parts,
    is_out_of_memory,
)  # fmt: skip

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:first", "auto:1", ""])
def test_a_name_that_torch_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"device is '{name}'; expected one of auto, cpu, cuda, mps"):
        choose_device(name)


def test_device_and_dtype() -> None:
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("float16", CPU) is torch.float16
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no cuda device"):
            choose_device("cuda:0")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_auto_is_bfloat16_on_processors_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_fast_dtype("auto", CPU) is expected
    assert choose_fast_dtype("float32", CPU) is torch.float32
    assert choose_fast_dtype("auto", torch.device("cuda")) is torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_fast_dtype("auto", CPU) is torch.float32


def test_batch_size_is_what_was_asked_for_or_fits() -> None:
    assert choose_batch_size(7, CPU, 1) == choose_batch_size(7, torch.device("cuda"), 1) == 7
    assert choose_batch_size(None, CPU, 10**12) == DEFAULT_BATCH_SIZE
    assert [fit_batch(100, size) for size in (1000, 100, 30, 25, 1)] == [1, 1, 2, 4, 64]
    assert fit_batch(10**12, 1) == LARGEST_BATCH_SIZE


def test_batch_of_a_gpu_is_what_a_part_of_its_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 * 2**30, 80 * 2**30))
    assert choose_batch_size(None, torch.device("cuda:0"), 200 * 2**20) == 64
    assert choose_batch_size(5, torch.device("cuda:0"), 200 * 2**20) == 5


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18.10 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_known_by_any_of_its_names(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_a_device_has_no_memory_for_is_computed_in_parts() -> None:
    def compute(part: slice) -> list[int]:
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(part.start, part.stop))

    assert [number for part in in_parts(compute, 3, 10) for number in part] == list(range(3, 10))
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(lambda part: compute(slice(0, 9)), 0, 4)
    with pytest.raises(RuntimeError, match="another"):
        in_parts(lambda part: (_ for _ in ()).throw(RuntimeError("another")), 0, 4)
