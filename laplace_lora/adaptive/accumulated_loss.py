"""What a `Trainer` makes of a model's loss: by which factor its accumulated gradients are off.

They accumulate over the micro-batches of a step, and over processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laplace_lora.data.draws import draws_kept
from laplace_lora.models.changes.modes import evaluation_mode

COUNT = "num_items_in_batch"


class AccumulatedLoss:
    """Finds the factor that makes a step's accumulated gradients those of the mean loss.

    The gradient that reaches a model's own loss says what the trainer divides or multiplies it by,
    whoever decides about that. A `Trainer` that gives a model the number of items of all
    micro-batches relies on its loss to divide by it, and many models, most with a head, take the
    number and ignore it: whether they do is tried out once.
    """

    def __init__(self) -> None:
        self._divides: bool | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._weight: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def watch(self, model: nn.Module) -> None:
        """Look at a model's next loss: what reaches it in the backward pass."""
        self.stop()
        self._weight = None
        self._hook = model.register_forward_hook(self._keep, with_kwargs=True)

    def scale(self, model: nn.Module, args: Any, steps: int, loss_scale: float = 1.0) -> float:
        """Return the factor of a step's gradients that makes them those of the mean loss.

        Args:
            model: The model that was watched.
            args: The ``TrainingArguments``.
            steps: How many micro-batches there were.
            loss_scale: A gradient scaler's factor.

        Raises:
            ValueError: If the trainer's loss is not made of the model's.
        """
        self.stop()
        if steps * copies(args) == 1:
            return 1.0
        if self._weight is None or not float(self._weight):
            raise ValueError(
                "the trainer computes its loss outside of the model, so it cannot be seen whether "
                "the gradients of several accumulation steps or processes are their sum or their "
                "mean: give gradient_scale to the callback, 1 for a mean (a loss divided by "
                "num_items_in_batch, or by the trainer), 1 / gradient_accumulation_steps for a sum "
                "of the steps' means"
            )
        if self._divides is None:
            inputs, options = self._call
            self._divides = COUNT in options and _divides(model, inputs, options)
        self._call = ((), {})
        # Copies in one process share a loss, of which each gets its part.
        weight = float(self._weight) / loss_scale * max(int(args.n_gpu), 1)
        if not self._divides:
            return 1 / (steps * weight)
        # Without the option each copy has a count of its own, and the copies' means are averaged.
        return (copies(args) if args.average_tokens_across_devices else 1) / weight

    def stop(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        self.stop()
        loss = _loss_of(outputs)
        if loss is not None and loss.requires_grad:
            loss.register_hook(self._reached)
            if self._divides is None:
                self._call = (args, kwargs)

    def _reached(self, gradient: Tensor) -> None:
        self._weight = gradient.detach()


def copies(args: Any) -> int:
    """Return how many copies of the model share a step.

    A trainer multiplies a loss by their number where it counts the items of all
    (``average_tokens_across_devices``).

    Args:
        args: The ``TrainingArguments``.
    """
    return max(int(args.n_gpu), int(args.world_size), 1)


@torch.no_grad()
def _divides(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the number of items changes a model's loss."""
    losses: list[Tensor] = []
    with draws_kept(), evaluation_mode(model):
        for factor in (1, 2):
            loss = _loss_of(model(*args, **{**kwargs, COUNT: factor * kwargs[COUNT]}))
            if loss is None:
                return True
            losses.append(loss)
    return not torch.equal(*losses)


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
