"""`in_turn`: one thread after the other, for models that PEFT changes while they run.

LoRA on stacked weights (``target_parameters``) and on `torch.nn.MultiheadAttention` replaces these
weights in their module for each pass, and CPT the memory that holds its own; Activated LoRA and
Poly register hooks that hold what one pass was called with; SHADOW keeps its small model's state of
a pass. Two passes at once would see each other's, and leave weights replaced for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from peft.tuners.lora.layer import MultiheadAttention
from torch import nn

_TURN = threading.RLock()
SETTINGS = ("target_parameters", "alora_invocation_tokens")
KINDS = ("CPT", "POLY", "SHADOW")
# Of models with these configurations, whether an adapter is merged in each pass.
_MERGES: WeakKeyDictionary[nn.Module, tuple[list[Any], bool]] = WeakKeyDictionary()


def changes_while_it_runs(model: object) -> bool:
    """Return whether PEFT changes a model for each pass.

    Its modules are looked at only if its configurations do not tell: a pass with LoRA on stacked
    weights adds modules and takes them away.

    Args:
        model: A `PeftModel`, or what is around one.
    """
    while not hasattr(model, "peft_config"):
        inner = getattr(model, "source", None) or getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            return False
        model = inner
    configs = list(model.peft_config.values())
    return _says_so(configs) or _merges(model, configs)


def _says_so(configs: list[Any]) -> bool:
    return any(
        any(getattr(config, name, None) for name in SETTINGS)
        or getattr(config, "peft_type", None) in KINDS
        for config in configs
    )


def _merges(model: Any, configs: list[Any]) -> bool:
    known, merges = _MERGES.get(model, ([], False))
    if known != configs:  # the same objects, unless an adapter came or went
        merges = any(isinstance(module, MultiheadAttention) for module in model.modules())
        _MERGES[model] = configs, merges
    return merges


@contextmanager
def in_turn(model: object) -> Iterator[None]:
    """Let other threads wait with such a model; others run in all threads at once.

    Args:
        model: A `PeftModel`, or what is around one.
    """
    with _TURN if changes_while_it_runs(model) else nullcontext():
        yield
