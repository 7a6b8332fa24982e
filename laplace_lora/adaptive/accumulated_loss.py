"""Whether the gradients that a `Trainer` accumulates are a sum over its steps, or a mean.

Steps are those of gradient accumulation, and processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laplace_lora.data.draws import draws_kept
from laplace_lora.models.modes import evaluation_mode

COUNT = "num_items_in_batch"


class AccumulatedLoss:
    """Finds out from a model's own loss whether accumulated gradients are a sum.

    A `Trainer` that gives a model the number of items of all accumulation steps relies on its loss
    to divide by it, and many models, most with a head, take the number and ignore it.
    """

    def __init__(self) -> None:
        self._sums: bool | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._has_loss = False
        self._hook: RemovableHandle | None = None

    def watch(self, model: nn.Module) -> None:
        """Keep the next call of a model, if nothing is known yet."""
        if self._sums is None and self._hook is None:
            self._hook = model.register_forward_hook(self._keep, with_kwargs=True)

    def scale(self, model: nn.Module, args: Any, steps: int) -> float:
        """Return the factor of a step's gradients that makes them those of the mean loss.

        Args:
            model: The model that was watched.
            args: The ``TrainingArguments``.
            steps: How many accumulation steps there were.

        Raises:
            ValueError: See `sums`.
        """
        number = copies(args)
        if steps * number == 1 or not self.sums(model):
            return 1.0
        return 1 / (steps * (number if args.average_tokens_across_devices else 1))

    def sums(self, model: nn.Module) -> bool:
        """Return whether gradients are a sum; called before the first step that uses them.

        Args:
            model: The model that was watched.

        Raises:
            ValueError: If the model did not compute the loss, which then tells nothing.
        """
        self.stop()
        if self._sums is None:
            if not self._has_loss:
                raise ValueError(
                    "the trainer computes its loss outside of the model, so it cannot be seen "
                    "whether the gradients of several accumulation steps or processes are their "
                    "sum or their mean: give gradient_scale to the callback, 1 for a mean (a loss "
                    "divided by num_items_in_batch, or by the trainer), 1 / "
                    "gradient_accumulation_steps for a sum of the steps' means"
                )
            args, kwargs = self._call or ((), {})
            self._sums = COUNT in kwargs and not _divides(model, args, kwargs)
            self._call = None
        return self._sums

    def stop(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        self._call, self._has_loss = (args, kwargs), _loss_of(outputs) is not None
        self.stop()


def copies(args: Any) -> int:
    """Return how many copies of the model share a step, by whose number a loss is multiplied.

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
