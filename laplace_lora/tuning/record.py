"""A `Tuning` as plain values for a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from torch import Tensor

from laplace_lora.tuning.evidence.structure_choice import StructureChoice
from laplace_lora.tuning.left_out.recentring import Recentring
from laplace_lora.tuning.left_out.report import LeaveOneOut
from laplace_lora.tuning.outcome import Tuning
from laplace_lora.tuning.texts.widest import Widest

PRECISION = "prior_precision"  # which a file holds anyway
REPORTS: dict[str, type[Any]] = {
    "leave_one_out": LeaveOneOut,
    "widest": Widest,
    "structure": StructureChoice,
    "recentring": Recentring,
}
T = TypeVar("T")


def record_of(tuning: Tuning) -> dict[str, Any]:
    """Return what a tuning did, but for its prior precision, as JSON can hold it."""
    empty = tuning.prior_precision.new_empty(0)
    record = asdict(replace(tuning, prior_precision=empty))
    del record[PRECISION]
    return record


def tuning_from(record: Mapping[str, Any], prior_precision: Tensor) -> Tuning:
    """Return the tuning that a record is of.

    Args:
        record: From `record_of`.
        prior_precision: What the tuning chose.

    Raises:
        ValueError: If it is no such record.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"tuning is {record!r}")
    return _read(Tuning, {**record, PRECISION: prior_precision}, "tuning")


def _read(kind: type[T], values: Any, name: str) -> T:
    """Return an object of a report's class, every value of which has its field's type.

    Values that only later versions know are left out.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r}")
    read: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = values.get(field.name, field.default)
        expected = str(field.type).removesuffix(" | None")
        if value is None and expected != field.type:
            read[field.name] = None
            continue
        inner = REPORTS.get(field.name)
        if inner is not None and inner.__name__ == expected:
            read[field.name] = _read(inner, value, field.name)
            continue
        is_right = type(value).__name__ == expected
        if expected == "dict[str, float]":
            is_right = isinstance(value, dict) and all(type(v) is float for v in value.values())
        if not is_right:
            raise ValueError(f"{field.name} of {name} is {value!r}")
        read[field.name] = value
    return kind(**read)
