"""Warn of a regression whose observation noise was left at 1 on targets of another scale."""

from __future__ import annotations

from laplace_lora.display.warning import warn
from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.profiled_noise import residual_deviation

FACTOR = 3.0


def warn_if_noise_is_off(posterior: Posterior) -> None:
    """Warn if the noise is 1 and the training residuals are three times larger or smaller.

    Args:
        posterior: A fitted posterior.
    """
    if not posterior.objective.has_noise or float(posterior.settings.sigma_noise.detach()) != 1:
        return
    residual = residual_deviation(posterior.state)
    if residual > FACTOR or residual < 1 / FACTOR:  # never of a loss that is not known
        width = "narrow" if residual > 1 else "wide"
        warn(
            f"the observation noise is 1, while the training residuals' deviation is "
            f"{residual:.3g}: the posterior is too {width}. Give tune_sigma_noise=True, or the "
            "posterior its sigma_noise",
        )
