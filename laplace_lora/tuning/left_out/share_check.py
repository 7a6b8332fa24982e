"""Warn where a mean is moved from what a loss with class weights may have been meant to give."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.base import Likelihood, Scoring
from laplace_lora.likelihoods.multilabel import MISSING

APART = 0.1  # mean probability of a class from its share of the labels, at least
CLEAR = 2.0  # and by how many standard errors of labels drawn with that probability


def warn_if_shares_differ(
    objective: Likelihood, scoring: Scoring, functions: Tensor, labels: Tensor
) -> None:
    """Warn if a model gives a class much more or less probability than it has examples.

    A plain likelihood that is fitted at all soon has the shares right, and one with class weights
    never does. The linearised model's mode is that of the plain likelihood.

    Args:
        objective: The likelihood; of preference pairs the first is always chosen.
        scoring: How its predictions are scored.
        functions: Of its training examples, ``(N, columns)``.
        labels: Of the examples, ``(N,)``; of independent labels ``(N, labels)``.
    """
    if not objective.is_classifier or objective.has_pairs:
        return
    nothing = functions.new_zeros(1, *functions.shape, functions.shape[-1])
    ((p,),) = scoring.metric_arguments(functions, nothing)
    is_known = labels != MISSING
    if labels.ndim == 1:
        labels = torch.nn.functional.one_hot(labels, p.shape[-1])
        is_known = is_known.unsqueeze(-1)
    known = is_known.expand_as(p).to(p)
    counts = known.sum(0).clamp(min=1)
    given, shares = (p * known).sum(0) / counts, (labels * known).sum(0) / counts
    chance = CLEAR * (given * (1 - given) / counts).sqrt()
    is_met = (shares > 0) & (shares < 1)  # others have no weights that tell
    excess = ((given - shares).abs() - chance.clamp(min=APART)).masked_fill(~is_met, 0)
    worst = int(excess.argmax())
    if float(excess[worst]) > 0:
        warn(
            f"the posterior's mean is moved to where the plain likelihood is larger. The model "
            f"gave label {worst} a probability of {given[worst]:.2f} in mean, and "
            f"{shares[worst]:.2f} of the training examples have it: if its loss had class weights, "
            "the move undoes them. recentre=False leaves the mean",
        )
