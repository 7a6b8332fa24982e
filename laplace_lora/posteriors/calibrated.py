"""`CalibratedLaplace`: a posterior's mean, width and temperature, moved after a tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.posteriors.predicted import PredictedLaplace
from laplace_lora.structures.state import PosteriorState
from laplace_lora.tuning.left_out.recentring import Recentring
from laplace_lora.tuning.options import check_predictive
from laplace_lora.tuning.tuner import Tuner
from laplace_lora.tuning.validation.calibration import Calibration


class CalibratedLaplace(PredictedLaplace):
    """Calls that are this package's own; the work is done by `Tuner`."""

    @in_full_precision
    def recentre(
        self,
        precision: float | None = None,
        *,
        nll: float | None = None,
        train_loader: Any = None,
        progress_bar: bool | None = None,
    ) -> Recentring:
        """Move the posterior's mean to the mode of the linearised model.

        Every linearised prediction then has the mean ``f(x; θ*) + J(x)(mean − θ*)``, at no further
        cost, and sampled weights lie around the new mean; the model keeps its weights, and prior
        and evidence stay as they are. `optimize_prior_precision` does this by itself where
        leave-one-out says that training stopped too early; elsewhere it makes predictions worse.
        See `tuning.left_out.recentring`.
        One pass over up to 3000 examples times contrasts, at most five over more.
        A fit, a tuning and `reset_mean` undo it. Files keep it.

        Args:
            precision: Prior precision of the linearised model around the trained weights; or
            nll: the mean training NLL that it is to have at its mode, in nats.
            train_loader: The training data, if not those of the fit in this process.
            progress_bar: Whether to show progress, see `progress`.

        Returns:
            What was done.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If not one of precision and NLL is given, or the training data are missing,
                not those of the fit, or a language model's.
        """
        data = self._train_loader if train_loader is None else train_loader
        settings, report = Tuner(self.fitted).recentre(precision, nll, data, progress_bar)
        self.state = self.state.with_settings(settings)
        return report

    def reset_mean(self) -> None:
        """Move the posterior's mean back to the MAP weights."""
        self.state = self.state.with_settings(replace(self.state.settings, shift=None))

    @in_full_precision
    def calibrate(
        self,
        val_loader: Any,
        link_approx: str = QUADRATURE,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        progress_bar: bool | None = None,
    ) -> Calibration:
        """Choose prior, width and temperature of a classifier's predictive on a validation set.

        Of a regression's: prior, width and observation noise. And how far a recentred mean is
        moved. What few labels leave open is averaged over, see `tuning.validation.calibration`.
        One pass over the data; afterwards ``la(batch)`` uses what was chosen. Calibrate for the
        link that you will predict with.
        Where ``la(batch)`` averages over samples of the weights, as for 50 classes or more, width
        and temperature are chosen for these samples; prior and mean stay.
        A fit, a merge and a tuning take back what was chosen, but for what you set since.

        Args:
            val_loader: Validation batches with labels.
            link_approx: Link of the predictive.
            n_samples: Samples for ``"mc"``, common to all candidates.
            generator: Source of these samples, or of those of the weights.
            progress_bar: Whether to show progress, see `progress`.

        Returns:
            The values chosen, and validation NLL and calibration error before and after; NLL is
            never worse.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If it is neither a classifier's nor a regression's, the loader is empty or
                without labels, the link is unknown, or there are to be no samples.
        """
        check_predictive("glm", link_approx, n_samples)
        options = (link_approx, n_samples, generator, progress_bar)
        posterior = self.fitted
        settings, report = Tuner(posterior).calibrate(val_loader, *options)
        settings = settings.calibrated_from(posterior.settings)
        self.state: PosteriorState = self.state.with_settings(settings)
        return report
