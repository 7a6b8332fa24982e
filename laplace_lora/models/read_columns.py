"""`ReadColumns`: which columns of a batch a model may read, by the names that it gives them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from laplace_lora.models.wrapped_model import base_of

LABELS = "labels"  # which `WrappedModel.inputs` leaves out


class ReadColumns:
    """From the columns of a batch to those that a model may read.

    The others are for the user, as the number of a row in the data set: models of transformers take
    any argument, and ignore those that neither they nor the modules inside them name.

    Args:
        model: A `PeftModel`, or any module.
    """

    def __init__(self, model: nn.Module) -> None:
        base: Any = base_of(model)
        own = inspect.signature(base.forward).parameters
        self._own = set(own)
        self._named = self._own | set(inspect.signature(model.forward).parameters)
        # PEFT takes these of any argument.
        self._named |= set(getattr(model, "special_peft_forward_args", ()))
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
            for kind in {type(module) for module in base.modules()}:
                # The class's: a compiled module has one of its own, which names nothing.
                forward = getattr(kind, "forward", nn.Module.forward)
                self._named |= set(inspect.signature(forward).parameters)

    def __call__(self, columns: Iterable[str]) -> set[str]:
        """Return the columns that the model may read.

        All but the labels where it names none, as a model that takes the mapping itself or nothing
        but ``**kwargs``.
        """
        columns = set(columns) - {LABELS}
        return columns & self._named if columns & self._own else columns
