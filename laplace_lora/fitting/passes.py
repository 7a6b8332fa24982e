"""Passes over training data that only add up: together with other processes, or in two sittings.

What is added belongs to the posterior classes; `fitting` makes a posterior of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_lora.data import distributed as sharding


@dataclass(frozen=True)
class Pass:
    """What one pass over the data adds up.

    Attributes:
        add: From sums, ``None`` before the first batch, inputs and labels to the batch's loss and
            the sums with the batch.
        tensors: The tensors that sums consist of.
        name: Part of a snapshot's file name.
        title: What the progress bar says.
        basis: Tensors in whose terms the sums are; those of the main process, where several share
            a loader.
    """

    add: Callable[[Any, Any, Tensor], tuple[Tensor, Any]]
    tensors: Callable[[Any], list[Tensor]]
    name: str = "fit"
    title: str = "Fitting the posterior"
    basis: Sequence[Tensor] = ()

    def signature(self, state: Any) -> Any:
        """Return what must be equal in processes whose sums go together."""
        return [tuple(tensor.shape) for tensor in self.tensors(state)]

    def combine(self, state: Any) -> None:
        """Take in what the other processes have summed up."""
        sharding.add_up(self.tensors(state))

    def resume(self, state: Any, kept: Sequence[Tensor]) -> None:
        """Put what an interrupted pass had summed up in the place of a first batch's sums."""
        for tensor, value in zip(self.tensors(state), kept, strict=True):
            tensor.copy_(value)


@dataclass
class Sums:
    """What a pass has added up.

    Attributes:
        state: Sums of the curvature, ``None`` before the first batch.
        loss: Summed loss.
        n: Number of examples.
        batches: Number of batches.
    """

    state: Any = None
    loss: float = 0.0
    n: int = 0
    batches: int = 0
