"""Which tensors share a prior precision, chosen by the evidence of each way.

A finer structure always has the higher maximum of the evidence, as it can do all that a coarser one
can. What counts is the evidence integrated over the precisions: each costs the part of its prior
range that the data leave it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.evidence.curves import couples, evidence_curve
from laplace_lora.tuning.evidence.marginal_likelihood import maximise, with_first_precision
from laplace_lora.tuning.groups import prior_groups

AUTO = "auto"
CANDIDATES = ("scalar", "matrix", "block", "layerwise")
BYTES = 2**31  # of Gram matrices; finer structures of exact posteriors are left out beyond
RANGE = math.log(1e8)  # of log δ, in which each precision may lie beforehand


@dataclass(frozen=True)
class StructureChoice:
    """Which structure was chosen, and how much the others fall behind.

    Attributes:
        structure: The choice, one of `CANDIDATES`.
        evidences: Of each structure compared, its log evidence in nats with its precisions
            integrated out.
    """

    structure: str
    evidences: dict[str, float]

    def __str__(self) -> str:
        others = ", ".join(f"{name} {value:.1f}" for name, value in self.evidences.items())
        return f"prior_structure={self.structure!r} by log evidence ({others})"


def choose_structure(posterior: Posterior, correction: bool) -> tuple[Settings, StructureChoice]:
    """Return the settings of the structure with the largest evidence, and what it was.

    Of an exact posterior, structures whose Gram matrices take more than 2 GB are left out.

    Args:
        posterior: A fitted posterior.
        correction: Whether to take the gradient term in, where it is known.
    """
    found = {}
    for structure in CANDIDATES:
        groups = prior_groups(posterior.names, structure)
        if _gram_bytes(posterior, groups) > BYTES:
            continue
        settings = maximise(posterior, groups, False, correction)
        found[structure] = settings, integrated_evidence(posterior, settings, groups, correction)
    best = max(found, key=lambda structure: found[structure][1])
    evidences = {structure: value for structure, (_, value) in found.items()}
    return found[best][0], StructureChoice(best, evidences)


def _gram_bytes(posterior: Posterior, groups: Tensor) -> int:
    """Return the size of the groups' Gram matrices, of which a joint evidence is."""
    if not couples(posterior, groups):
        return 0
    precision = posterior.precision
    assert isinstance(precision, RowPrecision)
    return 8 * (int(groups.max()) + 1) * len(precision.rows) ** 2


def integrated_evidence(
    posterior: Posterior, settings: Settings, groups: Tensor, correction: bool
) -> float:
    """Return the log evidence, in nats, with the precisions at its maximum integrated out.

    ``log δ`` has a uniform prior of width `RANGE`, and a posterior of variance ``2/γ`` with the
    effective number ``γ`` of its group's parameters (MacKay 1992, *Bayesian interpolation*).

    Args:
        posterior: A fitted posterior.
        settings: With the precisions at the maximum.
        groups: Group of each trainable tensor.
        correction: Whether to take the gradient term in, where it is known.
    """
    if not correction:  # the curves take the term in where it is known
        posterior = posterior.without_gradient_term()
    squares = posterior.state.squared_norms
    groups = groups.to(squares.device)
    deltas = settings.prior_precision.detach().to(squares).expand(len(groups))
    logs = squares.new_zeros(int(groups.max()) + 1).index_copy_(0, groups, deltas).log()
    curve = evidence_curve(with_first_precision(posterior), groups)
    noise = posterior.settings.sigma_noise.detach().double().log()
    left = 0.5 * torch.log(4 * math.pi / curve.effective(logs, noise)) - math.log(RANGE)
    return float(curve(logs, noise)) + float(left.clamp(max=0).sum())
