"""Whether the gradients that a `Trainer` accumulates are a sum over its steps, or a mean."""

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
        self._hook: RemovableHandle | None = None

    def watch(self, model: nn.Module) -> None:
        """Keep the next call of a model, if nothing is known yet."""
        if self._sums is None and self._hook is None:
            self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def sums(self, model: nn.Module) -> bool:
        """Return whether gradients are a sum; called before the first step that uses them.

        Args:
            model: The model that was watched.
        """
        self.stop()
        if self._sums is None:
            args, kwargs = self._call or ((), {})
            self._sums = COUNT in kwargs and not _divides(model, args, kwargs)
            self._call = None
        return self._sums

    def stop(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = args, kwargs
        self.stop()


@torch.no_grad()
def _divides(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the number of items changes a model's loss.

    Of a model without a loss, which is computed elsewhere, the number is the other's affair.
    """
    losses: list[Tensor] = []
    with draws_kept(), evaluation_mode(model):
        for factor in (1, 2):
            outputs = model(*args, **{**kwargs, COUNT: factor * kwargs[COUNT]})
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
            if loss is None or loss.numel() != 1:
                return True
            losses.append(loss)
    return not torch.equal(*losses)
