"""`Tuning`: what a tuning of the prior chose, how, and what speaks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_lora.display.tables import span
from laplace_lora.tuning.evidence.structure_choice import StructureChoice
from laplace_lora.tuning.left_out.report import LeaveOneOut
from laplace_lora.tuning.texts.widest import Widest

Report = LeaveOneOut | Widest | StructureChoice


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

    @classmethod
    def of(
        cls,
        method: str,
        prior_precision: Tensor,
        reason: str,
        *reports: Report,
    ) -> Tuning:
        """Return a tuning with its method's reports, each in its place."""
        places = {LeaveOneOut: "leave_one_out", Widest: "widest", StructureChoice: "structure"}
        placed: dict[str, Any] = {places[type(report)]: report for report in reports}
        return cls(method, prior_precision, reason, **placed)

    def __str__(self) -> str:
        report = self.leave_one_out or self.widest
        structure = f", {self.structure}" if self.structure else ""
        if report is not None:
            return f"{report}{structure}"
        why = f" (not the default: {self.reason})" if self.reason else ""
        return f"{self.method}: prior precision {span(self.prior_precision, 3)}{structure}{why}"
