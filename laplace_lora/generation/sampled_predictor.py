"""`SampledPredictor`: tokens' predictives from samples of the linearised model.

``f_s(x) = f(x; θ*) + J(x)(θ_s − θ*)`` with ``θ_s`` drawn once from the posterior: samples of the
GLM predictive (Immer et al. 2021, arXiv:2008.08711) for all tokens, positions and texts jointly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from laplace_lora.generation.next_token import HasPosterior, language_model_of
from laplace_lora.generation.reading import Reading
from laplace_lora.generation.sampled_token import SampledToken
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.tangents.forward_mode import forward_mode
from laplace_lora.predictive.sample_set import SampleSet


class SampledPredictor:
    """Opens texts for reading, all under the same samples of the weights.

    Args:
        la: A fitted posterior over a causal language model's adapters.
        top_k: Tokens to look at in each place.
        n_samples: Samples of the weights, in antithetic pairs.
        generator: Their source, on the posterior's device.

    Attributes:
        model: The language model.

    Raises:
        AttributeError: If the posterior has not been fitted.
        ValueError: If ``top_k`` or ``n_samples`` is out of range, or the model is no causal
            language model with a posterior over its adapters.
    """

    def __init__(
        self, la: HasPosterior, top_k: int, n_samples: int, generator: torch.Generator | None
    ) -> None:
        self._posterior = la.fitted
        self.model = language_model_of(self._posterior, top_k)
        self._samples = SampleSet(self._posterior, n_samples, generator)

    @contextmanager
    def opened(self, inputs: Mapping[str, Any], cached: bool = True) -> Iterator[Reading]:
        """Yield a reading of texts.

        Args:
            inputs: ``input_ids``, and whatever else the model takes.
            cached: See `Reading`.

        Raises:
            ValueError: If the model cannot carry tangents, see `forward_mode`.
        """
        parameters = self._posterior.engine.parameters
        with (
            evaluation_mode(self.model),
            forward_mode(self.model.model, parameters, self._samples.directions) as forward,
        ):
            yield Reading(self.model, forward, inputs, cached)

    def token(self, logits: Tensor, tangents: Tensor) -> SampledToken:
        """Return the predictive of tokens, at the calibrated temperature.

        Args:
            logits: At the MAP, ``(places, vocabulary)``.
            tangents: ``(directions, places, vocabulary)``; may be overwritten.
        """
        logits, tangents = (x.to(self._posterior.dtype) for x in (logits, tangents))
        temperature = self._posterior.settings.likelihood_temperature
        if temperature != 1:
            logits, tangents = logits / temperature, tangents.contiguous().div_(temperature)
        return SampledToken(logits, *self._samples.centred(logits, tangents), self._samples)
