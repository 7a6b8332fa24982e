"""Directions in weight space drawn from a posterior, one or two samples each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import check_count


class SampleSet:
    """Samples ``θ_s − θ*`` of a posterior's weights, calibrated width included.

    They come in antithetic pairs ``±δ``; of an odd number the last has no partner. The mean of a
    pair is the MAP itself, and as the linearised model is linear in ``δ``, one direction serves
    both (Hammersley & Morton 1956, *A new Monte Carlo technique: antithetic variates*). The mean of
    a recentred posterior is elsewhere, see `tuning.left_out.recentring`: how far is one more
    direction, the first.

    Args:
        posterior: A fitted posterior.
        n_samples: How many samples.
        generator: Their source, on the posterior's device.

    Attributes:
        directions: What the network carries along, ``(directions, parameters)``.

    Raises:
        ValueError: If ``n_samples`` is not positive.
    """

    def __init__(
        self, posterior: Posterior, n_samples: int, generator: torch.Generator | None
    ) -> None:
        check_count("n_samples", n_samples)
        self.n_samples = n_samples
        self.directions = posterior.deviations((n_samples + 1) // 2, generator)
        shift = posterior.settings.shift
        self._is_moved = shift is not None
        if shift is not None:
            self.directions = torch.cat([shift.to(self.directions).unsqueeze(0), self.directions])

    def centred(self, outputs: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs at the posterior's mean, and their change along each sample's direction.

        Args:
            outputs: At the MAP.
            tangents: Their change along each of `directions`.
        """
        if not self._is_moved:
            return outputs, tangents
        return outputs + tangents[0], tangents[1:]

    def outputs(self, mean: Tensor, tangents: Tensor) -> Tensor:
        """Return each sample's outputs, ``(samples, …)``.

        Args:
            mean: Outputs at the posterior's mean.
            tangents: Their change along each direction, ``(directions, …)``, see `centred`.
        """
        return torch.stack([mean + sign * tangent for tangent, sign in self._signed(tangents)])

    def each_output(self, mean: Tensor, tangents: Tensor, width: float = 1.0) -> Iterator[Tensor]:
        """Yield one sample's outputs after the other, see `outputs`, all in the same memory.

        Args:
            mean: Outputs at the posterior's mean.
            tangents: Their change along each direction.
            width: Of the samples, a factor of the tangents.
        """
        memory = torch.empty_like(mean)
        for tangent, sign in self._signed(tangents):
            yield torch.add(mean, tangent, alpha=sign * width, out=memory)

    def _signed(self, tangents: Tensor) -> list[tuple[Tensor, int]]:
        """Return the tangent and the sign of each sample."""
        partners = tangents[: self.n_samples - len(tangents)]
        return [*((tangent, 1) for tangent in tangents), *((tangent, -1) for tangent in partners)]
