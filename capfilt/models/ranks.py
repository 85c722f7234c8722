"""The processes that train one model together, as the losses see them; a process alone is `ALONE`.

In: tensors of this process. Out: those of all of them. Nothing here knows a process group: gathering is given.

Legend: B rows of this rank, A rows of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Gather = Callable[[Tensor], Tensor]
"""(B, …) of this rank → (A, …) of all ranks, in their order, gradients included."""


def identity(tensor: Tensor) -> Tensor:
    """Gathers on one process."""
    return tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Every rank has the same number of rows in a step."""

    rank: int = 0
    num_ranks: int = 1
    gather: Gather = identity

    def mean(self, value: Tensor) -> Tensor:
        """Average of a scalar over the ranks, without gradient.

        A sum over this rank's tokens divided by the average number of tokens, averaged over the ranks as
        gradients are, is the mean over the tokens of all ranks.
        """
        value = value.detach().float()
        return value if self.num_ranks == 1 else self.gather(value[None]).mean()

    def offset(self, num_rows: int) -> int:
        """Place of this rank's first row among those of all ranks."""
        return self.rank * num_rows


ALONE = Ranks()
"""One process."""
