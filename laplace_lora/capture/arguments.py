"""Arguments of a module's call by name, however they are passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from laplace_lora.data.sharding import unwrapped

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """What a module's forward pass takes.

    PEFT's wrapper may take anything and hand it on, so then the model inside it is asked.

    Args:
        module: Any module.

    Attributes:
        names: The parameters that may be given by position, in order.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = _parameters(module)
        while _takes_any(parameters) and hasattr(module, "get_base_model"):
            module = unwrapped(cast(Any, module).get_base_model())
            parameters = _parameters(module)
        self.names = [name for name, p in parameters.items() if p.kind in POSITIONAL]

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by name, without positional ones that have none."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def _parameters(module: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values())
