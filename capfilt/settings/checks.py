"""What several settings share: names that are allowed, and the check that each class makes at construction."""

from __future__ import annotations

from capfilt.errors import UsageError

EMBEDDED = "embedded"
"""The name that asks for a model shipped in the package; never taken unless it is named."""

DECODINGS = ("nucleus", "greedy", "beam", "top-k")
DEVICES = ("auto", "cpu", "cuda", "mps")
RESIZERS = ("torchvision", "pillow")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise UsageError with the setting's name, its value and what was expected, unless `condition` holds."""
    if not condition:
        raise UsageError(f"{name} is {value!r}; expected {expected}.")
