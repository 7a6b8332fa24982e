"""A regression's observation noise: beside its residuals, and at its best for each width.

Of prior precisions and noises with one product ``δ σ²``, a posterior's covariance is ``σ²`` times a
fixed one, and so is that of its predictions with their noise: the best ``σ²`` has a closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.regression import whitened
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.state import PosteriorState
from laplace_lora.tuning.evidence.marginal_likelihood import with_noise

SMALLEST = 1e-12  # factor of a variance; of predictions without any error, zero would be the best
OFF = 3.0  # how many times too large or too small a noise is pointed out


def residual_deviation(state: PosteriorState) -> float:
    """Return the root mean square of a regression's training residuals; NaN if it is not known."""
    return math.sqrt(2 * state.loss / max(state.n_data * state.n_outputs, 1))


def at_residual_noise(posterior: Posterior) -> Posterior:
    """Return a regression's posterior with its training residuals for noise, where there are any.

    Under this noise its curvature does not depend on the unit of the targets.
    """
    deviation = residual_deviation(posterior.state)
    if not 0 < deviation < math.inf:
        return posterior
    return with_noise(posterior, deviation)


def warn_if_noise_is_off(posterior: Posterior) -> None:
    """Warn of a noise below a third of the residuals' deviation, and of one that was left at 1.

    The latter where residuals are three times smaller. A larger noise that was chosen may be right.
    """
    if not posterior.objective.has_noise:
        return
    noise = float(posterior.settings.sigma_noise.detach())
    ratio = residual_deviation(posterior.state) / noise
    is_left = noise == 1
    if ratio > OFF or (is_left and ratio < 1 / OFF):  # never of a loss that is not known
        width = "narrow" if ratio > 1 else "wide"
        advice = "Give tune_sigma_noise=True, or the posterior its sigma_noise"
        if not is_left:
            advice = "tune_sigma_noise=True with method='loo' takes it from left-out examples"
        warn(
            f"the observation noise is {noise:.3g}, while the training residuals' deviation is "
            f"{ratio * noise:.3g}: predictions are too {width}. {advice}",
        )


@dataclass(frozen=True)
class ProfiledNoise:
    """Gaussian predictions whose covariances, those of their noise included, share a factor.

    Attributes:
        noise: Standard deviation of the observation noise without the factor.
        mean: Predictions, ``(examples, outputs)``.
        targets: What came, ``(examples, outputs)``.
    """

    noise: float
    mean: Tensor
    targets: Tensor

    def losses(self, covariance: Tensor) -> Tensor:
        """Return every example's negative log likelihood in nats, under the best factor.

        Args:
            covariance: Of the predictions, without noise and factor, ``(examples, c, c)``.

        Returns:
            Float64, ``(examples,)``.
        """
        squares, log_dets = self._whitened(covariance)
        factor = self._factor(squares)
        constant = self.mean.shape[-1] * math.log(2 * math.pi * factor)
        return 0.5 * (squares / factor + log_dets + constant)

    def factor(self, covariance: Tensor) -> float:
        """Return the best factor of covariances and of the noise's variance."""
        return self._factor(self._whitened(covariance)[0])

    def _whitened(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        return whitened(self.targets - self.mean, covariance.double(), self.noise)

    def _factor(self, squares: Tensor) -> float:
        return max(float(squares.mean()) / self.mean.shape[-1], SMALLEST)
