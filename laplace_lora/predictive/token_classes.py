"""`TokenClassPredictor`: what a posterior says of the class of every token of a batch.

By default from samples of the linearised model, whose cost depends on neither tokens nor classes.
Exact moments take a backward pass for each contrast of each token: gradients of the tokens of a
text meet in the same layers, so that they cannot share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.base import Readout
from laplace_lora.likelihoods.information import entropies, entropies_of
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.links import QUADRATURE, Link, check_finite
from laplace_lora.likelihoods.quadrature import averaged
from laplace_lora.likelihoods.roots import identity_root, standing_apart
from laplace_lora.likelihoods.token_classification import marked, real_tokens
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.predictive.data_sets import prediction_link
from laplace_lora.predictive.linear_samples import (
    AUTO,
    SAMPLED,
    LinearSamples,
    SampledOrExact,
    check_options,
)
from laplace_lora.predictive.query import NETWORKS, Query
from laplace_lora.predictive.token_class_predictions import TokenClassPredictions, at_tokens
from laplace_lora.predictive.weight_sampling import sampled_outputs
from laplace_lora.structures.posterior import Posterior

ROOM = 2**27  # numbers of a batch's Jacobians that are in memory at once


class TokenClassPredictor:
    """Predicts the tokens of any number of batches in the same way.

    Args:
        posterior: A fitted posterior of a token classifier.
        link_approx: Link of the exact method.
        n_samples: Samples of the weights, 64 by default; of the logits for ``"mc"``, 1000.
        generator: Their source, on the posterior's device; a fixed seed by default.
        method: ``"sampled"``; ``"exact"``; or ``"auto"``, which is exact where samples cannot be
            had: with another link, and if the model cannot carry tangents.

    Raises:
        ValueError: If an option is unknown or they do not go together.
    """

    def __init__(
        self,
        posterior: Posterior,
        link_approx: str = QUADRATURE,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
        method: str = AUTO,
    ) -> None:
        check_options(posterior, method, link_approx, generator)
        if posterior.differentiable:
            raise ValueError(
                "predictions of tokens cannot be differentiated; leave enable_backprop out"
            )
        self.posterior = posterior
        self._link: Link = prediction_link(posterior, link_approx, n_samples, generator)
        samples = None
        if method == SAMPLED or (method == AUTO and link_approx == QUADRATURE):
            samples = LinearSamples(posterior, n_samples, generator)
        self._answer = SampledOrExact(samples, method)

    def __call__(self, x: Mapping[str, Any]) -> TokenClassPredictions:
        """Return the predictions of all tokens of a batch but padding.

        Args:
            x: What the model takes; labels are ignored.

        Raises:
            TypeError: If it is no mapping of texts.
            FloatingPointError: If the model's outputs are not finite; names the tokens.
        """
        contrasts = self._link.sees_contrasts
        readout = self.posterior.objective.readout(x, contrasts=contrasts)
        return self._answer(
            lambda samples: self._sampled(samples, x, readout), lambda: self._exact(x, readout)
        )

    def moments(self, x: Mapping[str, Any], readout: Readout) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of functions of each token's outputs, calibrated.

        Args:
            x: What the model takes; labels are ignored.
            readout: The functions.

        Returns:
            Mean ``(tokens, columns)`` and covariance ``(tokens, columns, columns)`` of all tokens
            but padding, texts one after the other.
        """
        posterior = self.posterior
        counted = real_tokens(x).to(posterior.device)
        slots, most = counted.cumsum(1) - 1, int(counted.sum(1).max())
        columns = posterior.state.n_outputs - int(readout.relative)
        size = ROOM // (len(counted) * columns * sum(posterior.engine.sizes))
        size = min(max(size, 1), max(most, 1))
        mean = torch.zeros(*counted.shape, columns, dtype=posterior.dtype, device=posterior.device)
        covariance = mean.new_zeros(*mean.shape, columns)
        for first in range(0, most, size):
            part = counted & (slots >= first) & (slots < first + size)
            mean[part], covariance[part] = self._part(x, part, slots - first, size, readout)
        return posterior.settings.calibrated(mean[counted], covariance[counted])

    def _part(
        self, x: Mapping[str, Any], part: Tensor, slots: Tensor, size: int, readout: Readout
    ) -> tuple[Tensor, Tensor]:
        """Return the moments of some tokens, at most ``size`` of each text."""
        posterior = self.posterior
        texts, places = part.nonzero(as_tuple=True)[0], slots[part]

        def columns(f: Tensor) -> Tensor:
            check_finite(f)
            own = identity_root(f) if readout.columns is None else readout.columns(f)
            return standing_apart(own, places, size)

        def by_token(J: Tensor) -> Tensor:
            return J.unflatten(1, (size, -1)).flatten(0, 1)

        with evaluation_mode(posterior.model):
            options = (columns, posterior.model, len(part))
            f, jacobians = posterior.engine.jacobian_blocks(_counting(posterior, x, part), *options)
            covariance = posterior.precision.covariance(by_token(J) for J in jacobians)
        return readout.mean(f), covariance[texts * size + places]

    def _exact(self, x: Mapping[str, Any], readout: Readout) -> TokenClassPredictions:
        mean, covariance = (moment.detach() for moment in self.moments(x, readout))
        link, relative = self._link, readout.relative
        probs = link.log_probabilities(mean, covariance, relative).exp()
        total, information = entropies(mean, covariance, link.noise, relative)
        return self._laid_out(x, readout, mean, probs, total, information)

    def _sampled(
        self, samples: LinearSamples, x: Mapping[str, Any], readout: Readout
    ) -> TokenClassPredictions:
        mean, tangents = samples.tangents(_counting(self.posterior, x, real_tokens(x)), readout)
        log_p = samples.log_softmax(mean, tangents, readout)
        total, information = entropies_of(log_p)
        probs = averaged(log_p).exp()
        return self._laid_out(x, readout, mean, probs, total, information)

    def _laid_out(
        self, x: Mapping[str, Any], readout: Readout, mean: Tensor, *values: Tensor
    ) -> TokenClassPredictions:
        by_map = (F.pad(mean, (1, 0)) if readout.relative else mean).softmax(-1)
        mask = real_tokens(x).to(mean.device)
        return TokenClassPredictions.laid_out(mask, by_map, *values)


def token_probabilities(posterior: Posterior, x: Any, query: Query) -> Tensor:
    """Return class probabilities of a batch's tokens, see `LoraLaplace.__call__`.

    Returns:
        Shape ``(batch, tokens, classes)``, zeros at padding.
    """
    query.check_plain("token classifiers")
    link, source = query.link_approx, query.generator
    if query.pred_type == "glm":
        predictor = TokenClassPredictor(posterior, link, query.n_samples, source, query.method)
        return predictor(x).probs
    if query.pred_type != "nn" or link != "mc" or query.method == SAMPLED:
        raise ValueError(
            "pred_type must be 'glm', or 'nn' with link_approx='mc', which samples weights; got "
            f"{query.pred_type!r} with link_approx={link!r} and method={query.method!r}"
        )
    counted = real_tokens(x)
    marks, count = _counting(posterior, x, counted), query.samples(NETWORKS)
    probs = sampled_outputs(posterior, marks, count, source).softmax(-1).mean(0)
    return at_tokens(counted.to(probs.device), probs)


def _counting(posterior: Posterior, x: Mapping[str, Any], counted: Tensor) -> dict[str, Any]:
    """Return texts with labels that mark the tokens that are predicted."""
    labels = torch.zeros_like(counted, dtype=torch.long).masked_fill(~counted, IGNORED)
    return marked(x, labels, posterior.label_key)
