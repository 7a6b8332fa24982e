"""Dropout that is on in one thread alone, with masks that nothing but a seed decides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.models.changes.thread_hooks import own_hooks


class _Masks:
    """Draws masks with generators of its own: torch's global ones are other threads', too."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Return ``x`` with a share ``p`` of its entries zero, and the others divided by 1 - p.

        On a CPU these are the bits of `nn.Dropout` after `torch.manual_seed`.
        """
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(self._seed)
        mask = torch.empty_like(x).bernoulli_(1 - p, generator=self._generators[x.device])
        return x * (mask if p == 1 else mask.div_(1 - p))


@contextmanager
def dropout_on(
    dropouts: Sequence[nn.Dropout], asked: Mapping[nn.Module, set[nn.Module]], seed: int
) -> Iterator[None]:
    """Let modules drop in the passes of the current thread, though they are in evaluation mode.

    Modes are left alone, since all threads share them.

    Args:
        dropouts: Those that drop.
        asked: Layers that call those of them that are given here only if they themselves are in
            training mode, or may be such.
        seed: Of the masks.
    """
    masks = _Masks(seed)
    called: set[nn.Module] = set()

    def dropped(dropout: nn.Dropout) -> Callable[[Any, Any, Tensor], Tensor]:
        def drop(args: Any, kwargs: Any, x: Tensor) -> Tensor:
            called.add(dropout)
            return masks.drop(x, dropout.p)

        return drop

    def trained(layer: nn.Module) -> Callable[[Any, Any, Any], Any]:
        own = asked[layer].intersection(dropouts)
        training = copy.copy(layer)  # of the same modules and tensors
        training.training = True

        def run(args: Any, kwargs: Any, output: Any) -> Any:
            if not own <= called:
                output = type(layer).forward(training, *args, **kwargs)
            called.difference_update(own)
            return output

        return run

    with own_hooks() as hooks:
        # Before the user's own hooks, which see what they see in training.
        for dropout in dropouts:
            hooks.on_output(dropout, dropped(dropout), first=True)
        for layer in asked:
            hooks.on_output(layer, trained(layer), first=True)
        yield
