"""Let a model's head temporarily see fewer tokens, or compute fewer of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def last_true(mask: Tensor) -> Tensor:
    """Return the index of each row's last nonzero entry, shape ``(batch,)``."""
    return (torch.arange(mask.shape[1], device=mask.device) * (mask != 0)).argmax(-1)


@contextmanager
def one_token(
    head: nn.Module | None, position: Tensor | None, keep_length: bool = False
) -> Iterator[None]:
    """Let a head see one token of each example: ``position``, or the last if that is ``None``.

    With ``keep_length`` its output is repeated (as a view) over the tokens, for a model that picks
    the token from the head's output itself.
    """
    if head is None:
        yield
        return
    length = 1

    def narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal length
        hidden, length = args[0], args[0].shape[1]
        at = hidden.new_full((), length - 1, dtype=torch.long) if position is None else position
        rows = torch.arange(len(hidden), device=hidden.device)
        return (hidden[rows, at.to(hidden.device)].unsqueeze(1), *args[1:])

    def widen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.expand(-1, length, -1)

    handles = [head.register_forward_pre_hook(narrow)]
    if keep_length:
        handles.append(head.register_forward_hook(widen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def at_tokens(head: nn.Module, rows: Tensor, tokens: Tensor) -> Iterator[bool]:
    """Let a frozen head see chosen tokens only, each as a sequence; yields whether it does."""
    if any(parameter.requires_grad for parameter in head.parameters()):
        yield False  # its curvature needs the inputs by example
        return

    def narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        chosen = hidden[rows.to(hidden.device), tokens.to(hidden.device)]
        return (chosen.unsqueeze(1), *args[1:])

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield True
    finally:
        handle.remove()


@contextmanager
def rows_only(head: nn.Module, ids: Tensor) -> Iterator[bool]:
    """Let a plain frozen linear head compute only some rows; yields whether it does."""
    trainable = any(parameter.requires_grad for parameter in head.parameters())
    if type(head) is not nn.Linear or trainable or "forward" in vars(head):
        yield False
        return
    ids = ids.to(head.weight.device)
    bias = None if head.bias is None else head.bias[ids]
    head.forward = partial(F.linear, weight=head.weight[ids], bias=bias)  # type: ignore[method-assign]
    try:
        yield True
    finally:
        del head.forward
