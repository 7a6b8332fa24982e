"""`LinearSamples`: class probabilities from samples of the linearised model, in forward mode.

``f_s(x) = f(x; θ*) + J(x)(θ_s − θ*)`` with ``θ_s`` drawn from the posterior are samples of the GLM
predictive (Immer et al. 2021, arXiv:2008.08711). One costs about 1.5 forward passes however many
classes there are, and an antithetic pair no more than one; exact moments cost a backward pass and
their algebra for each contrast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import Readout
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.likelihoods.quadrature import averaged
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.predictive.sample_set import SampleSet
from laplace_lora.predictive.tangents import tangents_along, tangents_are_cheaper
from laplace_lora.structures.posterior import Posterior, check_generator

logger = logging.getLogger(__name__)
T = TypeVar("T")

AUTO, EXACT, SAMPLED = "auto", "exact", "sampled"
METHODS = (AUTO, EXACT, SAMPLED)
SAMPLES = 64
SEED = 0  # of samples, where no generator is given


class LinearSamples:
    """The linearised model under weights that are drawn once, for any number of batches.

    Args:
        posterior: A fitted posterior.
        n_samples: Samples of the weights, in antithetic pairs; 64 by default.
        generator: Their source, on the posterior's device; a fixed seed by default.

    Raises:
        ValueError: If ``n_samples`` is not positive, or gradients are asked for.
    """

    def __init__(
        self, posterior: Posterior, n_samples: int | None, generator: torch.Generator | None
    ) -> None:
        if posterior.differentiable:
            raise ValueError("samples cannot be differentiated; use method='exact'")
        self._posterior = posterior
        count = SAMPLES if n_samples is None else n_samples
        self._samples = SampleSet(posterior, count, seeded(posterior, generator))

    @torch.no_grad()
    def tangents(self, x: Any, readout: Readout) -> tuple[Tensor, Tensor]:
        """Return functions of a batch's outputs, and their change along each direction.

        Returns:
            At the posterior's mean ``(batch, columns)``, and ``(directions, batch, columns)``.

        Raises:
            ValueError: If the functions are no logits of classes.
            NoForwardDerivativeError: If the model cannot carry tangents.
            RuntimeError: If its values beside tangents are others than without.
            FloatingPointError: If the outputs are not finite; names the rows.
        """
        if not readout.is_softmax:
            raise ValueError(
                "method='sampled' averages class probabilities, and single rewards have none; use "
                "method='exact'"
            )
        mean, slopes = tangents_along(self._posterior, x, readout, self._samples.directions)
        temperature = self._posterior.settings.likelihood_temperature
        return self._samples.centred(mean / temperature, slopes / temperature)

    def log_softmax(self, mean: Tensor, tangents: Tensor, readout: Readout) -> Tensor:
        """Return the log probabilities under each sample, see `Readout.log_softmax`.

        Args:
            mean: See `tangents`.
            tangents: The same.
            readout: Of which functions they are.
        """
        return readout.log_softmax(self._samples.outputs(mean.to(tangents), tangents))

    def probabilities(self, x: Any, readout: Readout) -> Tensor:
        """Return class probabilities of a batch, ``(batch, classes)``, see `Readout.shown`."""
        log_p = averaged(self.log_softmax(*self.tangents(x, readout), readout))
        return readout.shown(log_p.exp())


class SampledOrExact:
    """Samples, and exact moments in their place if the model cannot carry tangents.

    Args:
        samples: ``None`` if exact moments are wanted from the start.
        method: ``"sampled"`` allows no exact moments.
    """

    def __init__(self, samples: LinearSamples | None, method: str) -> None:
        self._samples, self._method = samples, method

    def __call__(self, sampled: Callable[[LinearSamples], T], exact: Callable[[], T]) -> T:
        """Return what one of the two returns.

        Raises:
            NoForwardDerivativeError: If the model cannot carry tangents, and samples are asked for.
        """
        if self._samples is not None:
            try:
                return sampled(self._samples)
            except NoForwardDerivativeError as error:
                if self._method == SAMPLED:
                    raise
                logger.info("predicting from exact moments: %s", error)
                self._samples = None  # for good: the next batch would fail as well
        return exact()


def seeded(posterior: Posterior, generator: torch.Generator | None) -> torch.Generator:
    """Return a generator; one with a fixed seed if none is given.

    So every call gives the same answer, and torch's global state is left alone.
    """
    if generator is not None:
        return generator
    return torch.Generator(posterior.device).manual_seed(SEED)


def takes_samples(
    posterior: Posterior,
    method: str,
    link_approx: str,
    n_samples: int | None,
    generator: torch.Generator | None = None,
) -> bool:
    """Return whether class probabilities are to be averaged over samples of the weights.

    Args:
        posterior: A fitted posterior.
        method: ``"sampled"``; ``"exact"``; or ``"auto"``, whichever is the cheaper for a posterior
            over adapter weights, whose exact moments cost a backward pass for each contrast.
        link_approx: Links other than the default need exact moments.
        n_samples: Samples of the weights, 64 by default.
        generator: Their source.

    Raises:
        ValueError: If samples are to be taken where they cannot, and as `check_options`.
    """
    check_options(posterior, method, link_approx, generator)
    if method == SAMPLED and not posterior.objective.is_classifier:
        raise ValueError(
            f"method='sampled' averages class probabilities, and {posterior.objective.name} has "
            "none; use method='exact'"
        )
    if method != AUTO:
        return method == SAMPLED
    if link_approx != QUADRATURE or not posterior.objective.is_classifier:
        return False
    # Fewer samples than the default are a request for another link's, not for a rough answer.
    return tangents_are_cheaper(posterior, (max(n_samples or 0, SAMPLES) + 1) // 2)


def check_options(
    posterior: Posterior, method: str, link_approx: str, generator: torch.Generator | None
) -> None:
    """Refuse a method that is unknown or takes no such link, and a generator elsewhere.

    Raises:
        ValueError: If there is one of these.
        TypeError: If the generator is none.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == SAMPLED and link_approx != QUADRATURE:
        raise ValueError(
            f"link_approx={link_approx!r} starts from exact moments; it needs method='exact' "
            "('sampled' averages the softmax over samples of the weights)"
        )
    check_generator(generator, posterior.device)
