"""The two ways to predict tokens, by name, and what each takes and defaults to."""

from __future__ import annotations

import torch

from laplace_lora.generation.next_token import HasPosterior, NextTokenPredictor
from laplace_lora.likelihoods.links import QUADRATURE

SAMPLED, EXACT = "sampled", "exact"
METHODS = (SAMPLED, EXACT)
LINK_SAMPLES = 1000  # of the "mc" link


def check_method(method: str, link_approx: str | None) -> None:
    """Refuse unknown methods, and a link where nothing is linked.

    Raises:
        ValueError: If the method is unknown, or a link is given to ``"sampled"``.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == SAMPLED and link_approx is not None:
        raise ValueError(
            "link_approx integrates over exact moments; it needs method='exact' ('sampled' "
            "averages over samples of the weights)"
        )


def exact_predictor(
    la: HasPosterior,
    top_k: int,
    link_approx: str | None,
    n_samples: int | None,
    generator: torch.Generator | None,
) -> NextTokenPredictor:
    """Return the predictor of exact moments, with its defaults filled in, see there."""
    return NextTokenPredictor(
        la,
        top_k,
        QUADRATURE if link_approx is None else link_approx,
        LINK_SAMPLES if n_samples is None else n_samples,
        generator,
    )
