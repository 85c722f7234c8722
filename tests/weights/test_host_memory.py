"""Memory that is kept: a freed buffer is used again without asking the system for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
