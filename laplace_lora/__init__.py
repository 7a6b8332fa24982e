"""Calibrated uncertainty for LoRA-fine-tuned transformers, as a plugin for laplace-torch.

The public names; each folder behind them says in its `__init__` what is in it. All of them are
imported when the first one is asked for, so that what needs none, such as ``laplace-lora --help``,
does not wait for torch, PEFT and laplace-torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from laplace_lora.version import __version__

if TYPE_CHECKING:
    from laplace_lora.public_names import (
        AdapterStart,
        DiagLoraLaplace,
        DiagLoraLLLaplace,
        FullLoraLaplace,
        FullLoraLLLaplace,
        FunctionalLoraLLLaplace,
        KronLoraLaplace,
        KronLoraLLLaplace,
        LaplaceCallback,
        LogitsModel,
        LoraEF,
        LoraGGN,
        LowRankKron,
        LowRankKronDecomposed,
        LowRankLoraLaplace,
        start_of,
    )

__all__ = [
    "AdapterStart",
    "DiagLoraLLLaplace",
    "DiagLoraLaplace",
    "FullLoraLLLaplace",
    "FullLoraLaplace",
    "FunctionalLoraLLLaplace",
    "KronLoraLLLaplace",
    "KronLoraLaplace",
    "LaplaceCallback",
    "LogitsModel",
    "LoraEF",
    "LoraGGN",
    "LowRankKron",
    "LowRankKronDecomposed",
    "LowRankLoraLaplace",
    "__version__",
    "start_of",
]


def __getattr__(name: str) -> Any:
    """Import the public names, which also registers the posteriors with laplace-torch."""
    if not name.startswith("__"):
        public = import_module("laplace_lora.public_names")
        names = [known for known in __all__ if known != "__version__"]
        globals().update({known: getattr(public, known) for known in names})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
