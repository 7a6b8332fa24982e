"""`SpanPredictor`: where a posterior expects the answers of questions, from samples.

Start and end are independent given the weights, and not given the posterior: the probability of a
span is the product of its start's and its end's under each sample of the linearised model, averaged
over the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.information import entropy
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.likelihoods.quadrature import averaged, averaged_at
from laplace_lora.likelihoods.question_answering import CONTEXT, text_tokens
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.linear_samples import AUTO, SAMPLED, LinearSamples
from laplace_lora.predictive.query import NETWORKS, Query
from laplace_lora.predictive.span_predictions import SpanPredictions
from laplace_lora.predictive.weight_sampling import sampled_outputs
from laplace_lora.structures.posterior import Posterior

LONGEST = 30  # tokens of an answer, as in transformers' examples for SQuAD


class SpanPredictor:
    """Predicts any number of batches from the same samples of the weights.

    Args:
        posterior: A fitted posterior of a question-answering model.
        n_samples: Samples of the weights, 64 by default.
        generator: Their source, on the posterior's device; a fixed seed by default.

    Raises:
        ValueError: If ``n_samples`` is not positive, or gradients are asked for.
    """

    def __init__(
        self,
        posterior: Posterior,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.posterior = posterior
        self._samples = LinearSamples(posterior, n_samples, generator)

    def log_probabilities(self, x: Mapping[str, Any]) -> Tensor:
        """Return log probabilities of start and end under each sample.

        Args:
            x: What the model takes.

        Returns:
            Shape ``(samples, batch, 2, tokens)``.

        Raises:
            TypeError: If it is no mapping of texts.
            NoForwardDerivativeError: If the model cannot carry tangents.
        """
        return self._samples.log_softmax(*span_tangents(self._samples, x), LOGITS)

    def __call__(self, x: Mapping[str, Any], labels: Tensor | None = None) -> SpanPredictions:
        """Return the spans of a batch.

        Args:
            x: What the model takes, with ``context_mask`` where an answer may be; without it that
                is where ``token_type_ids`` are 1, or all of the text behind its first token.
            labels: First and last token of the true answers, ``(batch, 2)``.

        Raises:
            TypeError: If it is no mapping of texts.
            ValueError: If a context has no token.
        """
        real = text_tokens(x)
        log_p, own = self.log_probabilities(x), self._by_map(x)
        wide = log_p.double()  # else information would be rounding errors, and 0 times 0
        starts, ends = wide.exp().unbind(2)
        pairs = torch.einsum("kni,knj->nij", starts, ends) / len(log_p)
        aleatoric = (entropy(starts) + entropy(ends)).mean(0)
        information = (entropy(pairs.flatten(1)) - aleatoric).clamp(min=0).to(log_p.dtype)
        by_map = own[:, 0].exp().unsqueeze(2) * own[:, 1].exp().unsqueeze(1)
        none = real.to(torch.uint8).argmax(1).to(pairs.device)
        allowed = _allowed(x, real).to(pairs.device)
        found = {
            prefix + name: value
            for prefix, p in (("", pairs.to(log_p.dtype)), ("map_", by_map))
            for name, value in _best(p, allowed, none).items()
        }
        if labels is not None:
            found["label_prob"] = averaged_at(wide, labels).exp()
            found["map_label_prob"] = averaged_at(own.double().unsqueeze(0), labels).exp()
        return SpanPredictions(none=none, mutual_information=information, labels=labels, **found)

    def _by_map(self, x: Mapping[str, Any]) -> Tensor:
        """Return log probabilities at the posterior's mean, ``(batch, 2, tokens)``."""
        f = Predictor(self.posterior).unmoved_mean(x, LOGITS)
        f = f / self.posterior.settings.likelihood_temperature
        return f.unflatten(-1, (2, -1)).log_softmax(-1).to(self.posterior.dtype)


def _best(pairs: Tensor, allowed: Tensor, none: Tensor) -> dict[str, Tensor]:
    """Return the best span of each distribution over pairs, ``(batch, tokens, tokens)``."""
    best = pairs.masked_fill(~allowed, -1).flatten(1).argmax(1)
    start, end = best // pairs.shape[1], best % pairs.shape[1]
    rows = torch.arange(len(pairs), device=pairs.device)
    return {
        "start": start,
        "end": end,
        "prob": pairs[rows, start, end],
        "no_answer": pairs[rows, none, none],
        "entropy": entropy(pairs.flatten(1)),
    }


def _allowed(x: Mapping[str, Any], real: Tensor) -> Tensor:
    """Return which pairs may be answers, ``(batch, tokens, tokens)``."""
    context = x.get(CONTEXT)
    kinds = x.get("token_type_ids")
    if context is None and kinds is not None and bool((kinds == 1).any()):
        context = kinds == 1
    if context is None:
        context = real.cumsum(1) > 1
    context = torch.as_tensor(context).to(real.device) != 0
    if context.shape != real.shape:
        raise ValueError(
            f"{CONTEXT!r} must say of each token whether it is context, shape "
            f"{tuple(real.shape)}; got {tuple(context.shape)}"
        )
    context &= real
    empty = ~context.any(1)
    if bool(empty.any()):
        raise ValueError(
            f"row {int(empty.nonzero()[0])} has no context in which an answer could be"
        )
    places = torch.arange(real.shape[1], device=real.device)
    length = places - places.unsqueeze(1)
    in_order = (length >= 0) & (length < LONGEST)
    return context.unsqueeze(2) & context.unsqueeze(1) & in_order


def span_tangents(samples: LinearSamples, x: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return logits of starts and ends, and their change along each direction.

    Args:
        samples: Of a question-answering model's posterior.
        x: What the model takes.

    Returns:
        Shapes ``(batch, 2, tokens)`` and ``(directions, batch, 2, tokens)``.

    Raises:
        NoForwardDerivativeError: If the model cannot carry tangents.
    """
    try:
        mean, tangents = samples.tangents(x, LOGITS)
    except NoForwardDerivativeError as error:
        raise NoForwardDerivativeError(
            "spans are predicted from samples of the linearised model, which needs forward "
            "derivatives that this one lacks; average networks with sampled weights, "
            f"la(batch, pred_type='nn', link_approx='mc') ({error.__cause__ or error})"
        ) from error
    return mean.unflatten(-1, (2, -1)), tangents.unflatten(-1, (2, -1))


def span_probabilities(posterior: Posterior, x: Any, query: Query) -> Tensor:
    """Return probabilities of every token as start and as end, see `LoraLaplace.__call__`.

    Returns:
        Shape ``(batch, 2, tokens)``.
    """
    query.check_plain("question answering")
    if query.pred_type == "nn" and query.link_approx == "mc":
        outputs = sampled_outputs(posterior, x, query.samples(NETWORKS), query.generator)
        return outputs.unflatten(-1, (2, -1)).softmax(-1).mean(0)
    check_sampled(query.pred_type, query.link_approx, query.method)
    predictor = SpanPredictor(posterior, query.n_samples, query.generator)
    return averaged(predictor.log_probabilities(x)).exp()


def check_sampled(pred_type: str, link_approx: str, method: str) -> None:
    """Refuse what samples of the linearised model do not do.

    Raises:
        ValueError: If another type, link or method is asked for.
    """
    if pred_type != "glm" or link_approx != QUADRATURE or method not in (AUTO, SAMPLED):
        raise ValueError(
            "spans are predicted from samples of the linearised model: method='sampled' with the "
            "default link, or of networks: pred_type='nn' with link_approx='mc'; got "
            f"pred_type={pred_type!r}, link_approx={link_approx!r}, method={method!r}"
        )
