"""The layers of a model's stacks: compiled, recomputed in the backward pass, shared out among processes.

In: a module. Out: its layers, or the same module changed in place; names of weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from capfilt.models.med import TextLayer
from capfilt.models.qformer import QFormerLayer
from capfilt.train.cpu import fast_bfloat16_attention

_METHODS: dict[type[nn.Module], tuple[str, ...]] = {QFormerLayer: ("attend", "finish_queries", "finish_text")}
"""What the layers of a class are called by; `forward` alone for all others."""


def stacked_blocks(module: nn.Module) -> list[nn.Module]:
    """Every layer of every stack, each once; the outermost where stacks are nested."""
    found: dict[int, nn.Module] = {}
    inner: set[int] = set()
    for part in module.modules():  # from the outside in
        if not isinstance(part, nn.ModuleList) or id(part) in inner:
            continue
        for layer in part:
            found.setdefault(id(layer), layer)
            inner.update(id(child) for child in layer.modules())
    return list(found.values())


def called_blocks(module: nn.Module) -> list[nn.Module]:
    """Those that are called as modules and share no weight with another: the ViT's and a language model's layers."""
    return [block for block in stacked_blocks(module) if not isinstance(block, TextLayer | QFormerLayer)]


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Compiles each layer when it first runs; equal layers share what was compiled."""
    for block, name in _calls(module):
        if name == "forward":
            block.compile(backend=backend)
        else:
            setattr(block, name, torch.compile(getattr(block, name), backend=backend))


def recompute_blocks(module: nn.Module) -> None:
    """Each layer keeps its inputs alone and is run again in the backward pass: less memory, a third more time."""
    for block, name in _calls(module):
        setattr(block, name, _recomputed(getattr(block, name)))


def _calls(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for block in stacked_blocks(module):
        yield from ((block, name) for name in _METHODS.get(type(block), ("forward",)))


def _same_kernels() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Contexts of the forward pass and of its repetition, which is to take the same kernels: in reduced precision on a
    CPU attention has one of its own (`fast_bfloat16_attention`), and the backward pass stands outside.
    """
    is_own = torch.is_autocast_enabled("cpu")
    return nullcontext(), fast_bfloat16_attention() if is_own else nullcontext()


def _recomputed(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*inputs, **options)
        # What is compiled is recomputed as it was compiled, and takes no contexts.
        contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": _same_kernels}
        return checkpoint(method, *inputs, use_reentrant=False, **contexts, **options)

    return call
