"""Linear maps that do not train, on a CPU: weights laid out as oneDNN's kernels read them, activation in the same pass.

In: a module that runs and is not trained. Out: the same module or a copy, whose `nn.Linear`s are replaced where torch
has oneDNN's.

- as fast with ten rows as others with a thousand; in float32 on AMD with AVX-512 more than twice as fast as torch's own
  (MKL), without it slower by a fifth from a few hundred rows on
- from two rows on a row's result does not depend on the other rows, to the bit, in float32 and bfloat16
- the operators are torch's own but private: where a torch lacks them, the plain layers stay
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu", "silu"]
"""Exact GELU (BERT, BLIP's ViT); SiLU, which CLIP's QuickGELU is when the weights around it are scaled."""

Module = TypeVar("Module", bound=nn.Module)

_ONEDNN_NAMES = {"gelu": ("gelu", "none"), "silu": ("swish", "")}


class PackedLinear(nn.Module):
    """What a linear layer computes, from a packed copy of its weight.

    It has no parameters: it can be neither trained, nor saved, nor moved to another device or dtype.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """The activation of the above; in bfloat16 rounded once, after the activation.

        Without AVX-512 torch's own activation afterwards would be faster, but rows then depend on each other: at the
        ends of what a thread works on it rounds otherwise.
        """
        name, algorithm = _ONEDNN_NAMES[activation]
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, name, [], algorithm)


def activated(linear: nn.Module, x: Tensor, activation: Activation = "gelu") -> Tensor:
    """The activation of a linear layer's output, packed or not."""
    if isinstance(linear, PackedLinear):
        return linear.activated(x, activation)
    return _activate(linear(x), activation)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    """In place where no gradient is asked for."""
    if activation == "silu":
        return F.silu(x, inplace=not torch.is_grad_enabled())
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


def pack_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside by a packed one, in place, last of all: after loading and `.to`.

    Layers elsewhere than on a CPU, of other dtypes, or where torch has no such operators stay as they are. The plain
    weights are let go, unless something else holds them (a vocabulary that is the word embedding).
    """
    # A list of all modules would hold the plain layers, and their weights, to the end.
    for parent in [part for part in module.modules() if type(part) is not nn.Linear]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _can_pack(child.weight):
                setattr(parent, name, PackedLinear(child))


def packed_copy(module: Module) -> Module:
    """A copy to compute with, its linear layers packed; the rest it shares with `module`, which stays as it is.

    For a frozen part that is saved later, and for many rows at a time: the module itself where packed layers are no
    faster then. What is packed takes its memory twice.
    """
    if not has_avx512():
        return module
    return _packed_part(module)


def _packed_part(part: Module) -> Module:
    if type(part) is nn.Linear:
        return PackedLinear(part) if _can_pack(part.weight) else part  # pyright: ignore[reportReturnType]
    shared = copy.copy(part)
    children = part._modules.items()
    shared._modules = {name: None if child is None else _packed_part(child) for name, child in children}
    return shared


def _can_pack(weight: Tensor) -> bool:
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not (hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bfloat16())


@cache
def has_avx512() -> bool:
    """Whether torch computes with AVX-512 on this CPU."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN has kernels for bfloat16 on this CPU."""
    ops = torch.ops.mkldnn
    return hasattr(ops, "_is_mkldnn_bf16_supported") and bool(ops._is_mkldnn_bf16_supported())
