"""What samples of the linearised model know about a token, over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.generation.next_token import NextToken, candidates_of
from laplace_lora.generation.weights import SampleSet
from laplace_lora.likelihoods.links import averaged, entropy


class SampledToken:
    """The predictive of one token in each of several places.

    Probabilities are averages over samples, so nothing is approximated but by their number.

    Args:
        logits: At the MAP, divided by the temperature, ``(places, vocabulary)``.
        tangents: Their change along each direction, ``(directions, places, vocabulary)``.
        samples: What the directions stand for.

    Attributes:
        log_probabilities: Of the predictive, ``(places, vocabulary)``.
        scores: The same, shifted so that without uncertainty they are the MAP's logits.
        entropy: Of the predictive, in nats, ``(places,)``.
        mutual_information: Its epistemic part, ``(places,)``.
    """

    def __init__(self, logits: Tensor, tangents: Tensor, samples: SampleSet) -> None:
        self._logits, self._tangents = logits, tangents
        self._log_p = F.log_softmax(samples.outputs(logits, tangents), dim=-1)
        self.log_probabilities = averaged(self._log_p)
        self.scores = self.log_probabilities + logits.logsumexp(-1, keepdim=True)
        self.entropy = entropy(self.log_probabilities.exp())
        expected = entropy(self._log_p.exp()).mean(0)
        self.mutual_information = (self.entropy - expected).clamp(min=0)

    def of(self, tokens: Tensor, top_k: int) -> NextToken:
        """Return what is known about a token and the likeliest others.

        Args:
            tokens: One in each place, ``(places,)``.
            top_k: How many tokens to look at, the given one among them.
        """
        candidates = candidates_of(self._logits, top_k, tokens)
        slopes = self._tangents.gather(-1, candidates.expand(len(self._tangents), -1, -1))
        log_p = self.log_probabilities.gather(-1, candidates)
        map_log_p = F.log_softmax(self._logits, dim=-1)
        own = tokens.unsqueeze(-1)
        own_slope = self._tangents.gather(-1, own.expand(len(self._tangents), -1, -1)).squeeze(-1)
        shared = torch.einsum("kpv,pv->kp", self._tangents, map_log_p.exp())
        return NextToken(
            candidates,
            self._logits.gather(-1, candidates),
            torch.einsum("kpi,kpj->pij", slopes, slopes) / len(slopes),
            map_log_p.gather(-1, candidates),
            log_p,
            self.entropy,
            self.mutual_information,
            (1 - log_p.exp().sum(-1)).clamp(min=0),
            self._log_p.gather(-1, own.expand(len(self._log_p), -1, -1)).squeeze(-1).T,
            (own_slope - shared).T,
        )
