"""The numbers that a regression's labels are."""

from __future__ import annotations

import math
from typing import Any


def numbers_of(label: Any, number: int, outputs: int) -> float | list[float]:
    """Return a regression's target: a number, or a list of them for several outputs.

    Args:
        label: Of a row.
        number: The row's, from 1.
        outputs: Of the model.

    Raises:
        ValueError: If the label is something else.
    """
    values = label if isinstance(label, list) else [label]
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError("a boolean is a class")
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"row {number} has the label {label!r}, no number") from None
    if not all(map(math.isfinite, found)):
        raise ValueError(f"row {number} has the label {label!r}; expected finite numbers")
    if len(found) != outputs:
        raise ValueError(f"row {number} has the label {label!r}; expected {_targets(outputs)}")
    return found if outputs > 1 else found[0]


def _targets(outputs: int) -> str:
    if outputs == 1:
        return "a number"
    return (
        f"a list of {outputs} numbers, the targets of a regression, as model or options say; for "
        "classes say --likelihood classification or multilabel"
    )
