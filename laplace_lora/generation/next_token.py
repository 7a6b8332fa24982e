"""What a posterior knows about the next token: the likeliest ones, with their joint uncertainty.

The exact moments of the linearised predictive at one position. A softmax over ``k`` tokens and the
tail, which is one more class: its logit is the log-sum-exp of all other logits, linearised like
theirs. It is not held at its MAP value, since a softmax does not see what moves all logits
together, and a tail at rest would turn that into uncertainty. So nothing of the vocabulary's size
is ever squared, mass outside the ``k`` tokens is kept (how it is spread there, the MAP decides),
and with ``k`` one less than the vocabulary nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.generation.candidates import candidates_of, class_logits, tail_entropy
from laplace_lora.likelihoods.information import entropies_of, entropy
from laplace_lora.likelihoods.links import (
    QUADRATURE,
    Link,
    check_finite,
    contrasts_of,
    probit,
    sampled_log_softmax,
)
from laplace_lora.likelihoods.quadrature import ENTROPY_POINTS, averaged, normal_points
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.token_model import TokenModel
from laplace_lora.predictive.linear_samples import EXACT, SAMPLED
from laplace_lora.predictive.query import LINK_SAMPLES
from laplace_lora.structures.posterior import Posterior, check_generator

METHODS = (SAMPLED, EXACT)
LINKS = (QUADRATURE, "mc", "probit")
WANTED = "wanted_token"  # rides in a batch of texts


class HasPosterior(Protocol):
    """A posterior class: anything with the parts of a fitted posterior."""

    @property
    def fitted(self) -> Posterior:
        """The posterior's parts; raises AttributeError if it has not been fitted."""
        ...


@dataclass(frozen=True)
class NextToken:
    """The predictive of one token after each of several texts.

    Attributes:
        candidates: The ``k`` tokens looked at, by falling MAP probability, ``(texts, k)``.
        mean: Their logits, ``(texts, k)``.
        covariance: The logits' posterior covariance, ``(texts, k, k)``.
        map_log_probabilities: Log probabilities under the MAP weights, ``(texts, k)``.
        log_probabilities: Log probabilities under the posterior predictive, ``(texts, k)``.
        entropy: Entropy of the predictive over the whole vocabulary, in nats, ``(texts,)``.
        mutual_information: Its epistemic part, ``(texts,)``.
        tail_probability: Of all other tokens together under the predictive, ``(texts,)``.
        samples: Log probability of the token itself under each sample, ``(texts, samples)``; none
            where only moments are known.
        slopes: Its change along each direction of the samples, ``(texts, directions)``.
    """

    candidates: Tensor
    mean: Tensor
    covariance: Tensor
    map_log_probabilities: Tensor
    log_probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor
    tail_probability: Tensor
    samples: Tensor | None = None
    slopes: Tensor | None = None


class NextTokenPredictor:
    """Predicts next tokens from a posterior over adapter weights, whatever it was fitted on.

    Args:
        la: A fitted posterior over a causal language model's adapters.
        top_k: Tokens looked at.
        link_approx: ``"quadrature"``, the default, ``"mc"`` (samples of the logits) or
            ``"probit"``.
        n_samples: Samples for ``"mc"``, the same for all positions; 1000 by default.
        generator: Their source.

    Attributes:
        model: The language model.

    Raises:
        AttributeError: If the posterior has not been fitted.
        ValueError: If ``top_k`` or ``link_approx`` is out of range, the posterior was recentred, or
            the model is no causal language model with a posterior over its adapters.
        TypeError: If the generator is none, such as a seed.
    """

    def __init__(
        self,
        la: HasPosterior,
        top_k: int,
        link_approx: str | None = None,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        link_approx = QUADRATURE if link_approx is None else link_approx
        n_samples = LINK_SAMPLES if n_samples is None else n_samples
        self.posterior = posterior = la.fitted
        self.model = language_model_of(posterior, top_k)
        vocabulary: Any = self.model.vocabulary_size
        if posterior.settings.shift is not None:
            raise ValueError(
                "method='exact' has the mean of the model as it is, and the posterior was "
                "recentred; use method='sampled', or call la.reset_mean() first"
            )
        check_generator(generator, posterior.device)
        if link_approx not in LINKS:
            raise ValueError(f"link_approx must be one of {LINKS}, got {link_approx!r}")
        if n_samples < 1:
            raise ValueError(f"n_samples must be positive, got {n_samples}")
        self.top_k = top_k
        self.link_approx = link_approx
        contrasts = min(top_k, vocabulary - 1)
        place: Any = {"dtype": posterior.dtype, "device": posterior.device}
        if link_approx == "mc":
            self._noise = torch.randn(n_samples, contrasts, generator=generator, **place)
        elif link_approx == QUADRATURE:
            self._noise = normal_points(ENTROPY_POINTS, contrasts).to(**place)

    def __call__(
        self, texts: Mapping[str, Any], token: Tensor | None = None, rows: Tensor | None = None
    ) -> NextToken:
        """Predict the token after each text.

        One forward pass and ``top_k + 1`` backward passes for all texts together.

        Args:
            texts: A mapping with ``input_ids`` and ``attention_mask``, ``(texts, tokens)``.
            token: A token of each text that must be among the candidates, ``(texts,)``; if it is
                not, it takes the place of the least likely one.
            rows: The texts' rows in the user's batch; their own by default.

        Raises:
            FloatingPointError: If logits are not finite; names the rows.
        """
        texts = texts if token is None else {**texts, WANTED: token}
        candidates: Any = None
        inside: Any = None

        def classes(batch: Mapping[str, Any]) -> Tensor:
            nonlocal candidates, inside
            inputs = {name: value for name, value in batch.items() if name != WANTED}
            logits = self.model.next_logits(inputs) / self.posterior.settings.likelihood_temperature
            chosen = candidates_of(logits.detach(), self.top_k, batch.get(WANTED))
            # Diagonal blocks run the model again, on one text alone.
            if candidates is None:
                check_finite(logits, rows)
                candidates, inside = chosen, tail_entropy(logits.detach(), chosen)
            return class_logits(logits, chosen)

        with evaluation_mode(self.posterior.model):
            mean, jacobians = self.posterior.engine.jacobian_blocks(texts, function=classes)
            covariance = self._covariance(jacobians)
        return self._linked(candidates, mean, covariance, inside)

    def variance(self, texts: Mapping[str, Any]) -> Tensor:
        """Return the posterior variance of each text's log likelihood, ``(texts,)``.

        ``gᵀ P⁻¹ g`` with the gradient of the sum over the scored tokens: correlations between the
        tokens are part of it. One backward pass.

        Args:
            texts: A mapping with ``input_ids``, ``attention_mask`` and ``labels``.
        """

        def total(batch: Mapping[str, Any]) -> Tensor:
            return self.model.log_likelihood(
                batch, self.posterior.settings.likelihood_temperature
            ).unsqueeze(1)

        with evaluation_mode(self.posterior.model):
            _, jacobians = self.posterior.engine.jacobian_blocks(texts, function=total)
            return self._covariance(jacobians)[:, 0, 0]

    def _covariance(self, jacobians: Iterable[Tensor]) -> Tensor:
        scale = self.posterior.settings.covariance_scale
        return self.posterior.precision.covariance(jacobians) * scale

    def _linked(
        self, candidates: Tensor, mean: Tensor, covariance: Tensor, inside: Tensor
    ) -> NextToken:
        p_map = F.log_softmax(mean, dim=-1)
        mean, covariance = mean.to(self.posterior.dtype), covariance.to(self.posterior.dtype)
        k = self.top_k
        if self.link_approx == "probit":
            log_p = average = probit(mean, covariance)
            total = self._entropy(average, inside)
            information = (
                _second_order_information(p_map.exp(), covariance).clamp(min=0).minimum(total)
            )
        else:
            samples = sampled_log_softmax(*contrasts_of(mean, covariance), self._noise)
            log_p = average = averaged(samples)
            if self.link_approx == QUADRATURE:
                log_p = Link(QUADRATURE).log_probabilities(mean, covariance)
            total = self._entropy(average, inside)
            _, information = entropies_of(samples)
        return NextToken(
            candidates,
            mean[:, :k],
            covariance[:, :k, :k],
            p_map[:, :k],
            log_p[:, :k],
            total,
            information,
            log_p[:, k:].exp().sum(-1),
        )

    def _entropy(self, log_p: Tensor, inside: Tensor) -> Tensor:
        """Return the entropy over the vocabulary; within the tail the MAP decides."""
        return entropy(log_p.exp()) + log_p[:, self.top_k :].exp().sum(-1) * inside.to(log_p)


def check_call(la: HasPosterior, method: str, link_approx: str | None) -> None:
    """Refuse what is no posterior, unknown methods, and a link where nothing is linked.

    Raises:
        TypeError: If there is no posterior, such as a model in its place.
        ValueError: If the method is unknown, or a link is given to ``"sampled"``.
    """
    if not hasattr(type(la), "fitted"):  # an object that was not fitted would seem to have none
        raise TypeError(
            "texts are scored and written by a fitted posterior over a language model's adapters, "
            f"such as KronLoraLaplace, got {type(la).__name__}"
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == SAMPLED and link_approx is not None:
        raise ValueError(
            "link_approx integrates over exact moments; it needs method='exact' ('sampled' "
            "averages over samples of the weights)"
        )


def language_model_of(posterior: Posterior, top_k: int) -> TokenModel:
    """Return the language model whose adapters a posterior covers.

    Args:
        posterior: A fitted posterior.
        top_k: How many of its tokens are to be looked at.

    Raises:
        ValueError: If ``top_k`` is out of range, or the model is no causal language model with a
            posterior over its adapters.
    """
    if posterior.last_layer is not None:
        raise ValueError(
            "a last-layer posterior covers only the answer tokens; use one over adapter weights, "
            "such as KronLoraLaplace"
        )
    model = TokenModel(posterior.source.get_submodule("model"))
    vocabulary: Any = model.vocabulary_size
    if not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must lie in 1..{vocabulary}, the vocabulary's size, got {top_k}")
    return model


def _second_order_information(p: Tensor, covariance: Tensor) -> Tensor:
    """Return ``½ tr(Λ Σ)``, the mutual information to first order in the covariance."""
    own = (p * covariance.diagonal(dim1=-2, dim2=-1)).sum(-1)
    return 0.5 * (own - torch.einsum("ni,nij,nj->n", p, covariance, p))
