"""Multi-label classification: labels that do not exclude each other, a Bernoulli for each output.

An example has a row of labels, 1 where one applies and 0 where it does not; one that nobody knows
is `MISSING`, or not a number, and counts nowhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.base import Likelihood, Readout, Scoring
from laplace_lora.likelihoods.classification import ClassScoring
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.splitting import split_mapping_or_pair

MISSING = -100  # as Hugging Face and torch mark labels that do not count
LABELS = Readout(None, lambda f: f, is_softmax=True, independent=True)
STEEPEST = 600.0  # of the exponents of residual weights


class Multilabel(Likelihood):
    """The likelihood ``y_l ~ Bernoulli(σ(f_l))``, independent for all labels given the outputs."""

    name = "multilabel"
    laplace_name = "classification"  # which of laplace-torch's losses the evidence starts from
    is_classifier = True
    has_independent_labels = True

    def split(
        self, batch: Any, label_key: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Tensor]:
        """Split a batch into inputs and labels ``(batch, labels)``, see `known_labels`."""
        x, y = split_mapping_or_pair(batch, label_key, device)
        return x, known_labels(y.unsqueeze(-1) if y.ndim == 1 else y)

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the binary cross entropy in nats, summed over batch and known labels.

        Raises:
            ValueError: If there is not one label per output, or one is not 0, 1 or missing.
        """
        y = _fitting(f, y)
        losses = F.softplus(torch.where(y == 1, -f, f))
        return losses.masked_fill(y == MISSING, 0).sum()

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the exact root: a column per output, ``(outputs, batch, outputs)``.

        The output Hessian is ``diag(p (1 − p))`` with zeros at missing labels.
        """
        return torch.diag_embed(_deviations(f, y)).transpose(0, 1)

    def sampled_root(self, f: Tensor, num_samples: int, y: Tensor) -> Tensor:
        """Return an unbiased root of few columns, ``(num_samples, batch, outputs)``.

        A column has the root's entries with random signs, not sampled labels: the diagonal of the
        output Hessian is then exact, and what stands beside it has mean zero. Source: Hutchinson
        (1990), *A stochastic estimator of the trace of the influence matrix*.
        """
        size = (num_samples, *f.shape)
        signs = torch.randint(2, size, device=f.device).to(f.dtype).mul_(2).sub_(1)
        return signs * _deviations(f, y) / math.sqrt(num_samples)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """Return ``σ(f) − y``, zero at missing labels, ``(1, batch, outputs)``."""
        y = _fitting(f, y)
        return (f.sigmoid() - y).masked_fill(y == MISSING, 0).unsqueeze(0)

    def residual_weights(self, root: Tensor, f: Tensor, y: Tensor) -> Tensor | None:
        """Return ``(p − y) / √(p (1 − p))``: ``e^{f/2}`` without the label, ``−e^{−f/2}`` with."""
        y = _fitting(f, y)
        if len(root) != f.shape[-1]:
            return None
        sign = torch.where(y == 1, -1.0, 1.0).to(torch.float64)
        weights = sign * (sign * f.double() / 2).clamp(max=STEEPEST).exp()
        return weights.masked_fill(y == MISSING, 0).T

    def n_columns(self, outputs: int) -> int:
        """Return ``outputs``."""
        return outputs

    def readout(self, x: Any, pairs: bool = False, contrasts: bool = False) -> Readout:
        """Return the logits, each of which is the contrast of its own two classes."""
        return LABELS

    def scoring(self, link: Link, noise: float) -> Scoring:
        """Return the scoring of each label's probability."""
        return LabelScoring(link, LABELS)


class LabelScoring(ClassScoring):
    """Scores the probabilities of single labels, each of which applies or does not."""

    def nll(self, mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
        """Return each example's negative log likelihood in nats, ``(…, batch)``.

        Labels are scored one by one: the sum over the known ones, whose correlation under the
        posterior is left out.
        """
        is_known = y != MISSING
        losses = super().nll(mean, covariance, torch.where(is_known, y, 0))
        return torch.where(is_known, losses, 0).sum(-1)


def known_labels(y: Tensor) -> Tensor:
    """Return labels as integers, `MISSING` where they are not known.

    Args:
        y: 0, 1, and −100 or NaN where a label is missing, in any dtype.

    Raises:
        ValueError: If there are others.
    """
    if y.is_floating_point():
        y = y.masked_fill(y.isnan(), MISSING)
    bad = (y != 0) & (y != 1) & (y != MISSING)
    if bool(bad.any()):
        raise ValueError(
            "labels of a multi-label model must be 0, 1, or missing (-100 or NaN); got "
            f"{sorted(set(y[bad].flatten().tolist()))[:5]}"
        )
    return y.long()


def pooled(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return all known labels as examples of one binary classification.

    Class probabilities ``(examples, classes)`` with labels ``(examples,)`` are returned unchanged.

    Args:
        p: Probabilities that labels apply, ``(examples, labels)``.
        y: Labels, ``(examples, labels)``, see `known_labels`.

    Returns:
        Class probabilities ``(known, 2)`` and labels ``(known,)``.
    """
    if y.ndim == 1:
        return p, y
    y = known_labels(y)
    is_known = y != MISSING
    chosen = p[is_known]
    # A probability that its dtype cannot tell from 1 leaves the other class less than that.
    other = (1 - chosen).clamp(min=torch.finfo(p.dtype).eps / 4)
    return torch.stack([other, chosen], dim=-1), y[is_known]


def _fitting(f: Tensor, y: Tensor) -> Tensor:
    """Return labels, and refuse them if there is not one per output."""
    if y.shape != f.shape:
        raise ValueError(
            f"multi-label classification needs one label per output, shape {tuple(f.shape)}; got "
            f"shape {tuple(y.shape)}"
        )
    return known_labels(y)


def _deviations(f: Tensor, y: Tensor) -> Tensor:
    """Return ``√(p (1 − p))``, zero at missing labels, ``(batch, outputs)``."""
    wide = f.double()
    root = ((F.logsigmoid(wide) + F.logsigmoid(-wide)) / 2).exp().to(f.dtype)
    return root.masked_fill(_fitting(f, y) == MISSING, 0)
