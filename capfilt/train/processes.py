"""The processes of a training: one alone, or those that `torchrun` or `accelerate launch` started.

In: an objective on this process. Out: the same, with its gradients averaged over all processes: copies of it (DDP),
or its weights, gradients and optimizer state shared out (FSDP). accelerate chooses the device of each process and
joins them; FSDP is torch's `fully_shard`, which accelerate leaves out on CPUs.
"""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from capfilt.errors import UsageError
from capfilt.models.ranks import ALONE, Ranks
from capfilt.settings import TrainSettings
from capfilt.train.blocks import called_blocks
from capfilt.weights.devices import choose_device


@dataclass(frozen=True)
class Processes:
    """This process among those of the training."""

    device: torch.device
    ranks: Ranks = ALONE
    sharding: str = "none"
    """`none`: every process has all weights (DDP). `full`: each has its share of them (FSDP)."""

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.ranks.rank == 0

    @property
    def num(self) -> int:
        """How many processes train together."""
        return self.ranks.num_ranks

    def wrap(self, objective: nn.Module, *, some_unused: bool) -> nn.Module:
        """The module to call in place of `objective`, which must be on the device already.

        `some_unused`: not every weight takes part in every step. The weights of `objective` are those trained; with
        FSDP they are replaced, so take them afterwards.
        """
        if self.num == 1:
            return objective
        if self.sharding == "full":
            return _shard(objective)
        from torch.nn.parallel import DistributedDataParallel

        options: dict[str, Any] = {"find_unused_parameters": some_unused}
        options["device_ids"] = [self.device.index] if self.device.type == "cuda" else None
        newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        options["forward_sync_buffers" if newer else "broadcast_buffers"] = False  # queues are equal anyway
        return DistributedDataParallel(objective, **options)

    @contextmanager
    def accumulating(self, module: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one of several micro-batches: gradients travel with the last one only."""
        if self.num > 1 and self.sharding == "full":
            cast(Any, module).set_requires_gradient_sync(is_last)
        travels = is_last or self.num == 1 or self.sharding == "full"
        with nullcontext() if travels else cast(Any, module).no_sync():
            yield

    def gather_values(self, values_N: Tensor) -> Tensor:
        """(R, N): the values of every process."""
        if self.num == 1:
            return values_N[None]
        parts = [torch.empty_like(values_N) for _ in range(self.num)]
        dist.all_gather(parts, values_N)
        return torch.stack(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        """What each process gave, small and plain."""
        if self.num == 1:
            return [value]
        found: list[Any] = [None] * self.num
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.num > 1:
            dist.barrier()


def join_processes(settings: TrainSettings) -> Processes:
    """This process with those started beside it; alone on the setting's device where there are none.

    UsageError for weights that are to be shared out by an optimizer or in a precision that cannot.
    """
    sharding = "full" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else settings.sharding
    autocast = launched_autocast(settings)
    refuse_sharding(sharding, settings.optimizer, autocast)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(choose_device(settings.device), sharding=sharding)
    state = _join_group(choose_device(settings.device).type == "cpu")
    ranks = Ranks(state.process_index, state.num_processes, _gather)
    device = cast(torch.device, state.device)
    return Processes(torch.device("cpu") if device.type == "cpu" else device, ranks, sharding)


def refuse_sharding(sharding: str, optimizer: str, autocast: str) -> None:
    """UsageError for weights that are to be shared out by an optimizer or in a precision that cannot."""
    if sharding == "full" and (optimizer != "adamw" or autocast == "float16"):
        raise UsageError(
            f"sharding 'full' with optimizer {optimizer!r} and autocast {autocast!r}; expected adamw, and float32 or "
            "bfloat16. Leave --sharding away, or change the other."
        )


def launched_autocast(settings: TrainSettings) -> str:
    """The settings' `autocast`, or what `accelerate launch --mixed_precision` says where they say float32 or auto.

    UsageError where the launcher's is another one than the settings', or one that we do not compute in.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched == "no":
        return settings.autocast
    names = {"bf16": "bfloat16", "fp16": "float16"}
    if launched not in names or settings.autocast not in ("float32", "auto", names[launched]):
        raise UsageError(
            f"accelerate launches with mixed precision {launched!r} and autocast is {settings.autocast!r}; expected "
            f"bf16 or fp16, and no other one in the settings. Leave --mixed_precision away and give --autocast."
        )
    return names[launched]


@cache
def _join_group(on_cpu: bool) -> Any:
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu)
    atexit.register(state.destroy_process_group)
    return state


def full_tensor(tensor: Tensor) -> Tensor:
    """A weight as a whole, where each process has its share; every process must ask."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill_tensor(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into `target`, or this process's share of it."""
    if not hasattr(target, "full_tensor"):
        target.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor

    shared = cast(Any, target)
    shared.copy_(distribute_tensor(whole.to(target.device, target.dtype), shared.device_mesh, shared.placements))


@torch.no_grad()
def make_whole(module: nn.Module) -> None:
    """Puts whole weights into a module that is trained no further; every process must ask."""
    whole: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not hasattr(parameter, "full_tensor"):
                continue
            if id(parameter) not in whole:
                tensor = full_tensor(parameter)
                whole[id(parameter)] = nn.Parameter(tensor.detach(), requires_grad=parameter.requires_grad)
            part._parameters[name] = whole[id(parameter)]


def global_norm(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Norm of all gradients together, of all processes' shares where they are shared out."""
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    return full_tensor(nn.utils.get_total_norm(gradients))


def _gather(tensor: Tensor) -> Tensor:
    """(B, …) of each process, joined in the order of the ranks; gradients go back to where they belong."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _GatherWithGradient.apply(tensor))
    return _gather_plain(tensor)


def _gather_plain(tensor: Tensor) -> Tensor:
    sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(tensor.dtype)


class _GatherWithGradient(torch.autograd.Function):
    """The gradient of this process's rows is the sum of what all processes have for them.

    torch's own (torch.distributed.nn) mixes the rows up where gradients are not contiguous and the backend is gloo.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.num_rows = len(tensor)
        return _gather_plain(tensor.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.num_rows, ctx.num_rows)


def _shard(objective: nn.Module) -> nn.Module:
    """Shares out the weights: block by block where blocks are called as such, the rest together.

    Frozen weights in half precision outside of blocks stay whole on every process (a language model's embedding).
    """
    from torch.distributed.fsdp import fully_shard

    blocks = called_blocks(objective)
    inside = {id(p) for block in blocks for p in block.parameters()}
    whole = {p for p in objective.parameters() if p.dtype != torch.float32 and id(p) not in inside}
    for block in blocks:
        fully_shard(block)
    return cast(nn.Module, fully_shard(objective, ignored_params=whole))
