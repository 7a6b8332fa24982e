"""Keep a caller's autocast to the model: the library's own algebra runs in full precision.

The same wrapper undoes ``torch.inference_mode``, in which there are no gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
DEVICES = ("cpu", "cuda", "xpu", "mps")

_CALLER: ContextVar[tuple[tuple[str, torch.dtype], ...]] = ContextVar("autocast", default=())


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function run without the caller's autocast, but for models in `as_called`.

    The caller's ``torch.inference_mode`` does not reach it either.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return wrapped(*args, **kwargs)
        active = tuple(
            (device, torch.get_autocast_dtype(device))
            for device in DEVICES
            if torch.is_autocast_enabled(device)
        )
        if not active:
            return function(*args, **kwargs)
        before = _CALLER.get()
        try:
            _CALLER.set(active)
            with ExitStack() as stack:
                for device, _ in active:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)
        finally:
            _CALLER.set(before)

    return wrapped


@contextmanager
def as_called() -> Iterator[None]:
    """Run a model under the autocast that `in_full_precision` has switched off."""
    with ExitStack() as stack:
        for device, dtype in _CALLER.get():
            stack.enter_context(torch.autocast(device, dtype))
        yield
