"""Gradients by tensors as they are, whatever their hooks would make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def without_hooks(tensors: Sequence[Any]) -> Iterator[None]:
    """Suspend hooks that change the gradients of tensors, as PEFT's OSF and CPT register them.

    They steer a training. The model's derivative is what it is without them.
    """
    hooked: list[Any] = [p for p in tensors if isinstance(p, Tensor) and p._backward_hooks]
    hooks = [(p, p._backward_hooks) for p in hooked]

    def put_back() -> None:
        for p, own in hooks:
            p._backward_hooks = own

    try:
        for p in hooked:
            p._backward_hooks = None
        yield
    finally:
        try:
            put_back()
        finally:
            put_back()  # for an interrupt of the first
