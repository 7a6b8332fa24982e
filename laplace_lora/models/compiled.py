"""Compiled modules, run as they were written where hooks must be seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from laplace_lora.models.holders import Holders

COMPILED = "_laplace_lora_compiled"  # where a module keeps its compiled call meanwhile


def _decompile(module: Any) -> None:
    if _is_wrapper(module):
        vars(module)[COMPILED] = module.forward
        object.__setattr__(module, "forward", module._orig_mod.__call__)
    elif _has_compiled_pass(module):
        vars(module)[COMPILED] = module.forward
        module.forward = module.forward._torchdynamo_orig_callable
    else:
        vars(module)[COMPILED] = module._compiled_call_impl
        module._compiled_call_impl = None


def _recompile(module: Any) -> None:
    compiled = vars(module).pop(COMPILED)
    if _is_wrapper(module):
        object.__setattr__(module, "forward", compiled)
    elif "forward" in vars(module):
        module.forward = compiled
    else:
        module._compiled_call_impl = compiled


def _is_wrapper(module: nn.Module) -> bool:
    """Return whether a module is what ``torch.compile`` returns."""
    return type(module).__name__ == "OptimizedModule"


def _has_compiled_pass(module: nn.Module) -> bool:
    """Return whether a module's forward pass was compiled by itself, and assigned to it."""
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


_EAGER = Holders[nn.Module](_decompile, _recompile)


@contextmanager
def eager(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run compiled modules as they were written, temporarily.

    Compiled code does not look for hooks that were registered after it was made.

    Args:
        modules: All modules of the model.
    """

    def is_compiled(module: nn.Module) -> bool:
        called = getattr(module, "_compiled_call_impl", None) is not None
        return _is_wrapper(module) or _has_compiled_pass(module) or called

    with _EAGER.hold(modules, is_compiled):
        yield
