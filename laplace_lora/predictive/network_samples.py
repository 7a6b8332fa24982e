"""Samples of the weights for the network itself, run once per sample, and their averaged softmax.

A network is not linear in its weights: at the width of the linearised posterior, whole networks
with sampled weights predict far worse than samples of the linearised model. So a width belongs to
these samples that is their own, see `tuning.texts.served_width`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.label_check import check_labels
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.links import check_finite
from laplace_lora.predictive.weight_sampling import Network, run_with
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import check_count


class NetworkSamples:
    """A fixed set of samples of a posterior's weights, in antithetic pairs.

    Args:
        posterior: A fitted posterior over a model's own tensors.
        count: How many samples; of an odd number the last has no partner.
        seed: Of the samples.

    Raises:
        ValueError: If ``count`` is not positive.
    """

    def __init__(self, posterior: Posterior, count: int, seed: int) -> None:
        check_count("the number of samples", count)
        generator = torch.Generator(posterior.device).manual_seed(seed)
        half = posterior.deviations((count + 1) // 2, generator)
        self.posterior = posterior
        self.deviations = torch.stack([half, -half], dim=1).flatten(0, 1)[:count]

    def __len__(self) -> int:
        return len(self.deviations)

    def weights(self, width: float) -> Tensor:
        """Return the samples, ``(samples, parameters)``.

        Args:
            width: Factor of the posterior's covariance; zero gives its mean.
        """
        return self.posterior.centre + width**0.5 * self.deviations

    def label_log_probabilities(self, network: Network, batch: Any, width: float) -> Tensor:
        """Return log probabilities of labels under the average of the samples' softmaxes.

        Args:
            network: Of `sampled_network`.
            batch: Labelled batch, split by example.
            width: Factor of the covariance; zero for the mean alone.

        Returns:
            One for each example; each labelled token of a text; each known label where labels do
            not exclude each other.

        Raises:
            ValueError: If the labels are not the model's, see `check_labels`.
        """
        x, y = self.posterior.split(batch)
        known = y != IGNORED
        columns = []
        for log_p in self._each(network, x, width, y):
            if self.posterior.objective.has_independent_labels:
                log_p = log_p[known.flatten()]
            columns.append(log_p.gather(1, y[known].long().unsqueeze(1)))
        return (torch.cat(columns, dim=1).logsumexp(1) - math.log(len(columns))).double()

    def probabilities(self, network: Network, x: Any, width: float) -> Tensor:
        """Return the average of the samples' softmaxes, a row for each of what is labelled.

        Args:
            network: Of `sampled_network`.
            x: Batch that the model takes.
            width: Factor of the covariance; zero for the mean alone.
        """
        return torch.stack([log_p.exp() for log_p in self._each(network, x, width)]).mean(0)

    def _each(
        self, network: Network, x: Any, width: float, y: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield log probabilities under each sample, ``(rows, classes)``; labels are checked."""
        objective = self.posterior.objective
        temperature = self.posterior.settings.likelihood_temperature
        for weights in self.weights(width) if width else self.posterior.centre.unsqueeze(0):
            f = run_with(network, weights, x)
            check_finite(f)
            f = f.to(self.posterior.dtype)
            if y is not None:
                check_labels(objective, f, y)
                y = None  # every sample has outputs of the same shape
            if objective.has_independent_labels:
                f = f.flatten().unsqueeze(1)
            if f.shape[1] == 1:  # of a second class; the first one's stands at zero
                f = F.pad(f, (1, 0))
            yield (f / temperature).log_softmax(1)
