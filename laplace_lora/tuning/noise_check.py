"""Warn of a regression whose observation noise is far from its residuals."""

from __future__ import annotations

from laplace_lora.display.warning import warn
from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.left_out.profiled_noise import residual_deviation

FACTOR = 3.0


def warn_if_noise_is_off(posterior: Posterior) -> None:
    """Warn of a noise below a third of the residuals' deviation, and of one that was left at 1.

    The latter where residuals are three times smaller. A larger noise that was chosen may be right.
    """
    if not posterior.objective.has_noise:
        return
    noise = float(posterior.settings.sigma_noise.detach())
    ratio = residual_deviation(posterior.state) / noise
    is_left = noise == 1
    if ratio > FACTOR or (is_left and ratio < 1 / FACTOR):  # never of a loss that is not known
        width = "narrow" if ratio > 1 else "wide"
        advice = "Give tune_sigma_noise=True, or the posterior its sigma_noise"
        if not is_left:
            advice = "tune_sigma_noise=True with method='loo' takes it from left-out examples"
        warn(
            f"the observation noise is {noise:.3g}, while the training residuals' deviation is "
            f"{ratio * noise:.3g}: predictions are too {width}. {advice}",
        )
