"""Memory that is kept, and that is not: freed buffers are used again, kernels of old shapes are let go."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from capfilt.models.packed import multiplies_bfloat16

CODE = """
import resource, sys, torch
from capfilt.weights.host_memory import keep_freed_memory

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(64, 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = count_faults()
keep_freed_memory()
count_faults()  # until the heap has found its size
print(before, count_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large buffers back at once")
def test_freed_buffers_are_not_asked_for_anew() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert before > 20 * 100, "256 MiB are 128 pages of 2 MiB, or 65,536 of 4 KiB"
    assert after < before / 20


SHAPES_CODE = """
import re, sys, torch
from torch.nn.functional import linear
from capfilt.weights.host_memory import keep_few_kernels

if sys.argv[1] == "few":
    keep_few_kernels()
torch.set_num_threads(1)
weight = torch.randn(8000, 384, requires_grad=True)

def train(row_counts):
    for rows in row_counts:
        x = torch.randn(rows, 384, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x, weight)
        y.float().sum().backward()
        weight.grad = None

train(range(1000, 960, -2))
def peak_kb():  # not getrusage's, which begins at that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak_kb()
train(range(960, 840, -2))
print(peak_kb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    if not multiplies_bfloat16():
        pytest.skip("oneDNN has no kernels for bfloat16 on this CPU")
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    growth = {
        kept: int(subprocess.check_output([sys.executable, "-c", SHAPES_CODE, kept], env=environment, text=True))
        for kept in ("all", "few")
    }
    assert growth["few"] < 64 * 1024
    if growth["all"] < 200 * 1024:
        pytest.skip(f"sixty kernels grow to {growth['all'] / 1024:.0f} MiB on this CPU")
    assert growth["few"] < growth["all"] / 5
