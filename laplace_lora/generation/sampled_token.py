"""What samples of the linearised model know about a token, over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.generation.candidates import candidates_of
from laplace_lora.generation.next_token import NextToken
from laplace_lora.likelihoods.quadrature import averaged
from laplace_lora.predictive.sample_set import SampleSet


class SampledToken:
    """The predictive of one token in each of several places.

    Probabilities are averages over samples, so nothing is approximated but by their number.

    Args:
        map_logits: At the MAP, divided by the temperature, ``(places, vocabulary)``.
        logits: The same at the posterior's mean, which is elsewhere if it was recentred.
        tangents: Their change along each direction, ``(directions, places, vocabulary)``.
        samples: What the directions stand for.

    Attributes:
        log_probabilities: Of the predictive, ``(places, vocabulary)``.
        scores: The same, shifted so that without uncertainty they are ``logits``.
        entropy: Of the predictive, in nats, ``(places,)``.
        mutual_information: Its epistemic part, ``(places,)``.
    """

    def __init__(
        self, map_logits: Tensor, logits: Tensor, tangents: Tensor, samples: SampleSet
    ) -> None:
        self._map_logits = map_logits
        self._logits, self._tangents, self._samples = logits, tangents, samples
        p, expected = torch.zeros_like(logits), logits.new_zeros(len(logits))
        totals = []
        # One sample at a time: all of them over a vocabulary do not fit a processor's cache.
        for f in samples.each_output(logits, tangents):
            peak = f.amax(-1, keepdim=True)
            f -= peak
            weights = f.exp()
            total = weights.sum(-1, keepdim=True)
            p.addcdiv_(weights, total, value=1 / samples.n_samples)
            f.mul_(weights)
            expected += (total.log() - f.sum(-1, keepdim=True) / total).squeeze(-1)
            totals.append((peak + total.log()).squeeze(-1))
        self._totals = torch.stack(totals)
        # A probability may be smaller than its dtype's numbers.
        self.log_probabilities = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        self.scores = self.log_probabilities + logits.logsumexp(-1, keepdim=True)
        # As the expected entropy is summed: a dot product in float32 loses a vocabulary's tail.
        self.entropy = -(p * self.log_probabilities).sum(-1)
        self.mutual_information = (self.entropy - expected / samples.n_samples).clamp(min=0)

    def of(self, tokens: Tensor, top_k: int) -> NextToken:
        """Return what is known about a token and the likeliest others.

        Args:
            tokens: One in each place, ``(places,)``.
            top_k: How many tokens to look at, the given one among them.
        """
        candidates = candidates_of(self._map_logits, top_k, tokens)
        slopes = self._tangents.gather(-1, candidates.expand(len(self._tangents), -1, -1))
        log_p = averaged(
            self._samples.outputs(self._logits.gather(-1, candidates), slopes)
            - self._totals.unsqueeze(-1)
        )
        map_log_p = F.log_softmax(self._map_logits, dim=-1)
        own = tokens.unsqueeze(-1)
        own_slope = self._tangents.gather(-1, own.expand(len(self._tangents), -1, -1)).squeeze(-1)
        own_logit = self._logits.gather(-1, own).squeeze(-1)
        shared = torch.einsum("kpv,pv->kp", self._tangents, self._logits.softmax(-1))
        return NextToken(
            candidates,
            self._logits.gather(-1, candidates),
            torch.einsum("kpi,kpj->pij", slopes, slopes) / len(slopes),
            map_log_p.gather(-1, candidates),
            log_p,
            self.entropy,
            self.mutual_information,
            (1 - log_p.exp().sum(-1)).clamp(min=0),
            (self._samples.outputs(own_logit, own_slope) - self._totals).T,
            (own_slope - shared).T,
        )
