"""Gradients by tensors as they are, whatever their hooks would make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from laplace_lora.models.changes.holders import Holders

_KEPT: dict[int, Any] = {}  # the hooks of tensors that are without, by the tensors' ``id``


def _suspend(tensor: Any) -> None:
    _KEPT.setdefault(id(tensor), tensor._backward_hooks).update(tensor._backward_hooks)
    tensor._backward_hooks = None


def _put_back(tensor: Any) -> None:
    hooks = _KEPT.get(id(tensor))
    if hooks is not None:
        hooks.update(tensor._backward_hooks or {})  # the user may have registered one meanwhile
        tensor._backward_hooks = hooks
        del _KEPT[id(tensor)]


_WITHOUT_HOOKS = Holders[Any](_suspend, _put_back)


@contextmanager
def without_hooks(tensors: Sequence[Any]) -> Iterator[None]:
    """Suspend hooks that change the gradients of tensors, as PEFT's OSF and CPT register them.

    They steer a training. The model's derivative is what it is without them, in all threads.
    """
    hooked = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    with _WITHOUT_HOOKS.hold(hooked, lambda tensor: bool(tensor._backward_hooks)):
        yield
