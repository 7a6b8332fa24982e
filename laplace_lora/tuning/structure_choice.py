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

from laplace_lora.structures.settings import Settings
from laplace_lora.structures.state import Posterior
from laplace_lora.tuning.evidence import effective_parameters
from laplace_lora.tuning.evidence_curves import relative_evidence
from laplace_lora.tuning.groups import prior_groups
from laplace_lora.tuning.marginal_likelihood import maximise

AUTO = "auto"
CANDIDATES = ("scalar", "matrix", "block", "layerwise")
RANGE = math.log(1e8)  # of log δ, in which each precision may lie beforehand


@dataclass(frozen=True)
class StructureChoice:
    """Which structure was chosen, and how much the others fall behind.

    Attributes:
        structure: The choice, one of `CANDIDATES`.
        evidences: Of each structure, its log evidence in nats with its precisions integrated out.
    """

    structure: str
    evidences: dict[str, float]

    def __str__(self) -> str:
        others = ", ".join(f"{name} {value:.1f}" for name, value in self.evidences.items())
        return f"prior_structure={self.structure!r} by log evidence ({others})"


def choose_structure(
    posterior: Posterior, correction: bool = True
) -> tuple[Settings, StructureChoice]:
    """Return the settings of the structure with the largest evidence, and what it was.

    Args:
        posterior: A fitted posterior.
        correction: Whether to take the gradient term in, where it is known.

    Raises:
        ValueError: If the data couple the tensors, as in an exact posterior.
    """
    if posterior.structure.couples_groups:
        raise ValueError(
            "prior_structure='auto' compares evidences with their gradient term, which an exact "
            "posterior has for a scalar only; give 'scalar' or another structure by name"
        )
    found = {}
    for structure in CANDIDATES:
        groups = prior_groups(posterior.names, structure)
        settings = maximise(posterior, groups, False, correction)
        found[structure] = settings, integrated_evidence(posterior, settings, groups, correction)
    best = max(found, key=lambda structure: found[structure][1])
    evidences = {structure: value for structure, (_, value) in found.items()}
    return found[best][0], StructureChoice(best, evidences)


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
    spectra, squares = posterior.precision.spectra(), posterior.state.squared_norms
    scale, groups = float(posterior.scale.detach()), groups.to(squares.device)
    deltas = settings.prior_precision.detach().to(squares).expand(len(groups))
    precisions = squares.new_zeros(int(groups.max()) + 1).index_copy_(0, groups, deltas)
    gain = posterior.gradient_term if correction else None
    value = relative_evidence(precisions, groups, spectra, squares, gain, scale)
    effective = torch.zeros_like(precisions)
    effective.index_add_(0, groups, effective_parameters(spectra, deltas))
    left = 0.5 * torch.log(4 * math.pi / effective) - math.log(RANGE)
    return float(value - scale * posterior.state.loss + left.clamp(max=0).sum())
