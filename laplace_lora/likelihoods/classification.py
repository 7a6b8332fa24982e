"""Classification: one label per example, a softmax over the model's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import CONTRASTS, Likelihood, Readout, Scoring
from laplace_lora.likelihoods.label_check import check_logits
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.roots import (
    cross_entropy,
    sampled_softmax_root,
    several_logits,
    softmax_residual,
    softmax_root,
)
from laplace_lora.likelihoods.splitting import split_mapping_or_pair

MULTILABEL_PROBLEM = "multi_label_classification"  # as Hugging Face's configurations call it
LOGITS = Readout(None, several_logits, is_softmax=True)


class Classification(Likelihood):
    """The likelihood ``y ~ softmax(f)``."""

    name = "classification"
    laplace_name = "classification"
    is_classifier = True

    def check_values(self, f: Tensor) -> None:
        """Refuse probabilities in the place of logits, see `check_logits`."""
        if f.shape[-1] > 1:
            check_logits(f, "the model")

    def check_problem(self, problem_type: str | None) -> None:
        """Refuse a model of independent labels, whose softmax means nothing.

        Raises:
            ValueError: If it is one.
        """
        if problem_type == MULTILABEL_PROBLEM:
            raise ValueError(
                f"the model's configuration says problem_type={problem_type!r}: use "
                "likelihood='multilabel', or correct `model.config.problem_type` if its classes "
                "exclude each other"
            )

    def split(
        self, batch: Any, label_key: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Tensor]:
        """Split a batch into inputs and labels ``(batch,)``, see `split_mapping_or_pair`."""
        x, y = split_mapping_or_pair(batch, label_key, device)
        # Not every kernel takes short or boolean labels; fractions are refused with the loss.
        return x, y if y.is_floating_point() else y.long()

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the cross entropy, summed over the batch, see `cross_entropy`.

        Raises:
            ValueError: If there are fewer than two outputs, or labels are no classes.
        """
        return cross_entropy(several_logits(f), y)

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the exact root, ``(outputs − 1, batch, outputs)``, see `softmax_root`."""
        return softmax_root(f)

    def sampled_root(self, f: Tensor, num_samples: int, y: Tensor) -> Tensor:
        """Return a Monte-Carlo root, see `sampled_softmax_root`."""
        return sampled_softmax_root(f, num_samples)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """Return ``softmax(f) − onehot(y)``, ``(1, batch, outputs)``."""
        return softmax_residual(f, y)

    def residual_weights(self, root: Tensor, f: Tensor, y: Tensor) -> Tensor | None:
        """Return ``−Sᵀ e_y / p_y``: ``S Sᵀ e_y = p_y (e_y − p)`` holds for every exact root."""
        log_p = f.double().log_softmax(-1).gather(-1, y.unsqueeze(-1))
        at_label = root.double().gather(-1, y.expand(len(root), -1).unsqueeze(-1)).squeeze(-1)
        return -at_label * (-log_p.squeeze(-1)).clamp(max=600).exp()

    def readout(self, x: Any, pairs: bool = False, contrasts: bool = False) -> Readout:
        """Return the logits, or their contrasts."""
        return CONTRASTS if contrasts else LOGITS

    def scoring(self, link: Link, noise: float) -> Scoring:
        """Return the scoring of class probabilities."""
        return ClassScoring(link, CONTRASTS if link.sees_contrasts else LOGITS)


@dataclass(frozen=True)
class ClassScoring:
    """Scores the class probabilities of Gaussian logits.

    Attributes:
        link: From logits to probabilities.
        readout: The logits, or their contrasts.
    """

    link: Link
    readout: Readout

    def nll(self, mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
        """Return each example's negative log likelihood in nats, ``(…, batch)``."""
        scores = self._log_probabilities(mean, covariance)
        index = y.expand(scores.shape[:-1]).unsqueeze(-1)
        return -scores.gather(-1, index).squeeze(-1)

    def metric_arguments(self, mean: Tensor, covariance: Tensor) -> list[tuple[Tensor, ...]]:
        """Return probabilities, see `Readout.shown`, for each covariance of a grid."""
        p = self._log_probabilities(mean, covariance).exp()
        return [(each,) for each in self.readout.shown(p)]

    def _log_probabilities(self, mean: Tensor, covariance: Tensor) -> Tensor:
        return self.link.log_probabilities(*self.readout.of_softmax(mean, covariance))
