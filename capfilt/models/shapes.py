"""Modules that are shapes only: no memory and no values, which a checkpoint's weights are to replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = ("normal_", "uniform_")


class _WithoutDraws(TorchFunctionMode):
    """Leaves tensors as they are where they were to be filled at random.

    Filling one that has no memory does nothing, by functions of torch's that are Python's and take five seconds to
    import.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules built herein are on torch's meta device: `load_state_dict(…, assign=True)` gives them their weights."""
    with torch.device("meta"), _WithoutDraws():
        yield
