"""`Tuning`: what a tuning of the prior chose, how, and what speaks for it; and as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor

from laplace_lora.display.tables import span
from laplace_lora.tuning.evidence.structure_choice import StructureChoice
from laplace_lora.tuning.left_out.recentring import Recentring
from laplace_lora.tuning.left_out.report import LeaveOneOut
from laplace_lora.tuning.texts.widest import Widest

PRECISION = "prior_precision"  # which a file holds anyway
REPORTS = {kind.__name__: kind for kind in (LeaveOneOut, Widest, StructureChoice, Recentring)}
T = TypeVar("T")


@dataclass(frozen=True)
class Tuning:
    """What a tuning of the prior did.

    Attributes:
        method: How the prior precision was chosen.
        prior_precision: The choice.
        reason: Why ``"auto"`` took no better method; empty where it did.
        leave_one_out: What leave-one-out promises, where that was the method.
        widest: What training texts say of the width, where that was the method.
        structure: What the evidence says of the prior's structures, where it was to choose one.
    """

    method: str
    prior_precision: Tensor
    reason: str = ""
    leave_one_out: LeaveOneOut | None = None
    widest: Widest | None = None
    structure: StructureChoice | None = None

    def __str__(self) -> str:
        report = self.leave_one_out or self.widest
        structure = f", {self.structure}" if self.structure else ""
        if report is not None:
            return f"{report}{structure}"
        why = f" (not the default: {self.reason})" if self.reason else ""
        return f"{self.method}: prior precision {span(self.prior_precision, 3)}{structure}{why}"


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
        if expected in REPORTS:
            read[field.name] = _read(REPORTS[expected], value, field.name)
            continue
        is_right = type(value).__name__ == expected
        if expected == "dict[str, float]":
            is_right = isinstance(value, dict) and all(type(v) is float for v in value.values())
        if not is_right:
            raise ValueError(f"{field.name} of {name} is {value!r}")
        read[field.name] = value
    return kind(**read)
