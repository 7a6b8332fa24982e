"""Let a model's head temporarily see fewer tokens, or compute fewer of its rows.

Only in the current thread: other threads' forward passes see the head as it is.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.data.sharding import is_sharded_tensor
from laplace_lora.models.changes.thread_hooks import STRUCTURE, own_hooks


def last_true(mask: Tensor) -> Tensor:
    """Return the index of each row's last nonzero entry, shape ``(batch,)``."""
    return (torch.arange(mask.shape[1], device=mask.device) * (mask != 0)).argmax(-1)


def at_position(values: Tensor, position: Tensor | None, length: int) -> Tensor:
    """Return each example's values at one token, ``(batch, d)``.

    Args:
        values: Shape ``(batch, tokens, d)``.
        position: Index of the token, ``None`` for the last.
        length: Number of tokens that the index counts, see `one_token`.
    """
    if position is None:
        return values[:, -1]
    rows = torch.arange(len(values), device=values.device)
    return values[rows, position.to(values.device) + values.shape[1] - length]


@contextmanager
def one_token(
    head: nn.Module,
    position: Tensor | Callable[[], Tensor | None] | None,
    keep_length: bool = False,
    length: int | None = None,
) -> Iterator[None]:
    """Let a head see one token of each example: ``position``, or the last if that is ``None``.

    With ``keep_length`` its output is repeated (as a view) over the tokens, for a model that picks
    the token from the head's output itself.

    Args:
        head: The head.
        position: Index of the token of each example, ``(batch,)``; or a function that tells it when
            the head runs.
        keep_length: See above.
        length: Number of tokens that ``position`` counts. Tokens that the model puts before them,
            as prompt tuning does, are skipped.
    """
    seen = 1

    def narrow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal seen
        hidden, seen = args[0], args[0].shape[1]
        chosen = position() if callable(position) else position
        counted = seen if length is None else length
        return (at_position(hidden, chosen, counted).unsqueeze(1), *args[1:]), kwargs

    def widen(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return output.expand(-1, seen, -1)

    with own_hooks() as hooks:
        hooks.on_input(head, narrow)
        if keep_length:
            hooks.on_output(head, widen)
        yield


@contextmanager
def at_tokens(head: nn.Module, rows: Tensor, tokens: Tensor, length: int) -> Iterator[bool]:
    """Let a frozen head see chosen tokens only, each as a sequence; yields whether it does.

    Args:
        head: The head.
        rows: Example of each token.
        tokens: Index of each token in its example.
        length: Number of tokens that the indices count, see `one_token`.
    """
    if any(parameter.requires_grad for parameter in head.parameters()):
        yield False  # its curvature needs the inputs by example
        return

    def narrow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        at = tokens.to(hidden.device) + hidden.shape[1] - length
        return (hidden[rows.to(hidden.device), at].unsqueeze(1), *args[1:]), kwargs

    with own_hooks() as hooks:
        hooks.on_input(head, narrow)
        yield True


class _RowsByThread:
    """Takes the place of a linear layer's ``forward``; each thread may choose rows of its own."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.rows: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, hidden: Tensor) -> Tensor:
        weight, bias = self.rows.get(threading.get_ident(), (self.head.weight, self.head.bias))
        return F.linear(hidden, weight, bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> _RowsByThread:
        """Return that of a copied layer, of which no thread has chosen rows."""
        return _RowsByThread(copy.deepcopy(self.head, memo))


@contextmanager
def rows_only(head: nn.Module, ids: Tensor) -> Iterator[bool]:
    """Let a plain frozen linear head compute only some rows; yields whether it does."""
    trainable = any(parameter.requires_grad for parameter in head.parameters())
    if type(head) is not nn.Linear or trainable or is_sharded_tensor(head.weight):
        yield False
        return
    ids = ids.to(head.weight.device)
    rows = head.weight[ids], None if head.bias is None else head.bias[ids]
    thread = threading.get_ident()
    forward: Any = None
    narrowed = False

    def release() -> None:
        with STRUCTURE:
            if narrowed:
                forward.rows.pop(thread, None)
                if not forward.rows and vars(head).get("forward") is forward:
                    del vars(head)["forward"]

    try:
        with STRUCTURE:
            forward = vars(head).get("forward", _RowsByThread(head))
            narrowed = isinstance(forward, _RowsByThread) and thread not in forward.rows
            if narrowed:
                forward.rows[thread] = rows
                vars(head)["forward"] = forward
        yield narrowed
    finally:
        try:
            release()
        finally:
            release()  # for an interrupt of the first
