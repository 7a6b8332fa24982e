"""What one iteration over training data adds up, alone or with other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.data.distributed import Together
from laplace_lora.linalg.row_storage import RowStorage


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

    def combine(self, state: Any, team: Together, has_data: bool) -> None:
        """Take in what the other processes have summed up.

        Args:
            state: The sums.
            team: The processes.
            has_data: Whether the sums are of this process's data, or only show what sums there are.
        """
        if not has_data:
            for tensor in self.tensors(state):
                tensor.zero_()
        team.add_up(self.tensors(state))

    def resume(self, state: Any, stored: Sequence[Tensor]) -> None:
        """Put what an interrupted pass had summed up in the place of a first batch's sums.

        Raises:
            ValueError: If these are other sums, as an earlier version may have kept.
        """
        sums = self.tensors(state)
        if [tensor.shape for tensor in sums] != [value.shape for value in stored]:
            raise ValueError(
                "an earlier version of this package began the fit, and summed up something else; "
                "delete the files of its checkpoint_dir to start anew"
            )
        for tensor, value in zip(sums, stored, strict=True):
            tensor.copy_(value)


@dataclass
class FitSums:
    """What the first pass of a fit adds up.

    Attributes:
        curvature: Sums of the structure's kind, ``None`` before the first batch.
        gradient: The loss's gradient; ``None`` where it takes a backward pass of its own.
    """

    curvature: Any
    gradient: LossGradient | None


class RowPass(Pass):
    """A pass that collects rows, where others add up."""

    def combine(self, state: FitSums, team: Together, has_data: bool) -> None:
        """Take in the rows of all processes, in the order of their ranks."""
        rows: RowStorage = state.curvature
        team.agree([*rows.sizes, str(rows.dtype)])
        gathered = rows.like()
        for i in range(len(rows.sizes)):
            local = rows.matrix(i).to(rows.device)
            gathered.append(i, team.gather(local if has_data else local[:0]))
        rows.take(gathered)
        if state.gradient is not None:
            if not has_data:
                state.gradient.total.zero_()
            team.add_up([state.gradient.total])

    def resume(self, state: FitSums, stored: Sequence[Tensor]) -> None:
        """Put the rows of an interrupted pass in the place of a first batch's."""
        if state.gradient is not None:
            *stored, gradient = stored
            state.gradient.total.copy_(gradient)
        state.curvature.replace(stored)


@dataclass
class Sums:
    """What a pass has added up.

    Attributes:
        state: Sums of the curvature, ``None`` before the first batch.
        loss: Summed loss.
        n: Number of examples.
        batches: Number of batches.
        labels: Number of labels that are known, of tokens or of independent labels several an
            example.
    """

    state: Any = None
    loss: float = 0.0
    n: int = 0
    batches: int = 0
    labels: int = 0
