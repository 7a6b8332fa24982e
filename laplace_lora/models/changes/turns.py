"""`in_turn`: one thread after the other, for models that PEFT changes while they run.

LoRA on stacked weights (``target_parameters``) replaces these in their module for each pass;
Activated LoRA and Poly register hooks that hold what one pass was called with. Two passes at once
would see each other's, and leave stacked weights replaced for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

_TURN = threading.RLock()
SETTINGS = ("target_parameters", "alora_invocation_tokens")
KINDS = ("POLY",)


def changes_while_it_runs(model: object) -> bool:
    """Return whether PEFT changes a model for each pass.

    Its modules are not looked at: another thread may be changing them.

    Args:
        model: A `PeftModel`, or what is around one.
    """
    while not hasattr(model, "peft_config"):
        inner = getattr(model, "source", None) or getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            return False
        model = inner
    return any(
        any(getattr(config, name, None) for name in SETTINGS)
        or getattr(config, "peft_type", None) in KINDS
        for config in model.peft_config.values()
    )


@contextmanager
def in_turn(model: object) -> Iterator[None]:
    """Let other threads wait with such a model; others run in all threads at once.

    Args:
        model: A `PeftModel`, or what is around one.
    """
    with _TURN if changes_while_it_runs(model) else nullcontext():
        yield
