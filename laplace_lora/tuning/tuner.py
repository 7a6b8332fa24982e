"""`Tuner`: chooses a posterior's settings, by marginal likelihood or on a validation set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from laplace_lora.data.distributed import Together, together
from laplace_lora.data.messages import OtherProcessFailed, kind_of
from laplace_lora.data.one_draw import same_draw
from laplace_lora.likelihoods.base import labels_tokens
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.linear_samples import AUTO as CHEAPER
from laplace_lora.predictive.linear_samples import takes_samples
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings, check_positive
from laplace_lora.tuning.evidence.curves import couples
from laplace_lora.tuning.evidence.marginal_likelihood import (
    maximise,
    with_first_precision,
    with_precisions,
)
from laplace_lora.tuning.evidence.structure_choice import AUTO, choose_structure
from laplace_lora.tuning.groups import PriorStructure, prior_groups
from laplace_lora.tuning.left_out import leave_one_out
from laplace_lora.tuning.left_out.recentring import Recentring, recentred
from laplace_lora.tuning.left_out.recentring_by_passes import Aim, TrainingPasses
from laplace_lora.tuning.same_data import check_at_hand
from laplace_lora.tuning.texts import widest
from laplace_lora.tuning.validation.cache import ValidationCache, scoring_of
from laplace_lora.tuning.validation.calibration import Calibration, calibrate
from laplace_lora.tuning.validation.coupled_cache import CoupledCache
from laplace_lora.tuning.validation.sample_calibration import calibrate_by_samples
from laplace_lora.tuning.validation.search import Loss, descend, grid_search

logger = logging.getLogger(__name__)


Found = tuple[Settings, Mapping[str, Any]]  # and reports, by their names in `Tuning`


@dataclass(frozen=True)
class Request:
    """What a tuning on training data is asked for.

    Attributes:
        structure: Which tensors share a prior precision, see `prior_groups`.
        loader: The training data of the fit, ``None`` where they are not at hand.
        is_given: Whether the loader was given, and is not that of the fit.
        progress_bar: Whether to show progress, see `progress`.
        recentre: Whether leave-one-out may move the posterior's mean.
        tune_noise: Whether to choose a regression's noise as well.
    """

    structure: PriorStructure
    loader: Any
    is_given: bool
    progress_bar: bool | None
    recentre: bool
    tune_noise: bool


class Tuner:
    """Makes new settings for a posterior, whose state it does not change."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def _together(self, loader: Any) -> AbstractContextManager[Together]:
        posterior = self.posterior
        return together(loader, device=posterior.device, runs=posterior.source)

    def marginal_likelihood(
        self, structure: PriorStructure, tune_noise: bool, correction: bool
    ) -> Found:
        """Return the settings that maximise the log marginal likelihood.

        Args:
            structure: Which tensors share a prior precision, see `prior_groups`, or ``"auto"``.
            tune_noise: Whether to choose a regression's noise as well.
            correction: Whether to take the evidence's gradient term in, where it is known.

        Raises:
            ValueError: If the structure is unknown, or see `choose_structure`.
        """
        if structure == AUTO:
            if tune_noise:
                raise ValueError(
                    "prior_structure='auto' leaves the observation noise as it is; tune it with a "
                    "structure given by name"
                )
            settings, choice = choose_structure(self.posterior, correction)
            return settings, {"structure": choice}
        groups = prior_groups(self.posterior.names, structure)
        return maximise(self.posterior, groups, tune_noise, correction), {}

    def by_training_data(self, method: str, request: Request) -> Found:
        """Return what leave-one-out finds, or the width that training texts bear, see `widest`.

        Args:
            method: ``"loo"``, or ``"widest"``, which takes the prior of the evidence.
            request: What is asked for.

        Raises:
            ValueError: If the data are missing, or see `leave_one_out.tune` and `widest.tune`; of
                leave-one-out also if the structure is not a scalar.
        """
        loader, progress_bar = request.loader, request.progress_bar
        if method == "loo":
            _check_scalar("leave-one-out", request.structure)
            check_at_hand(loader, "leave-one-out")
            loader = same_draw(loader, "leave-one-out")
            with self._together(loader) as team:
                options = (loader, team, progress_bar, request.recentre, request.tune_noise)
                settings, left_out = leave_one_out.tune(self.posterior, *options)
            return settings, {"leave_one_out": left_out}
        check_at_hand(loader, "method='widest'")
        settings, reports = self.marginal_likelihood(request.structure, False, correction=False)
        posterior = self.posterior.with_settings(settings)
        with self._together(loader) as team:
            settings, texts = widest.tune(posterior, loader, team, progress_bar)
        return settings, {"widest": texts, **reports}

    def recentre(
        self,
        precision: float | None,
        nll: float | None,
        train_loader: Any,
        progress_bar: bool | None,
    ) -> tuple[Settings, Recentring]:
        """Return settings with the mean at the linearised model's mode, see `recentred`.

        Raises:
            ValueError: If not one of precision and NLL is given or it is not positive, or the
                training data are missing or not those of the fit.
        """
        if (precision is None) == (nll is None):
            raise ValueError("give either `precision` or `nll`")
        if precision is not None:
            check_positive("precision", precision)
        if nll is not None:
            check_positive("nll", nll)
        check_at_hand(train_loader, "recentring")
        train_loader = same_draw(train_loader, "recentring")
        readout = scoring_of(self.posterior, QUADRATURE, 0).readout
        with self._together(train_loader) as team:
            data = TrainingPasses(self.posterior, train_loader, team, readout, progress_bar)
            tempered = None if nll is None else nll / self.posterior.temperature
            shift, report = recentred(data, Aim(tempered, precision))
        return replace(self.posterior.settings, shift=shift), report

    def grid_search(
        self,
        structure: PriorStructure,
        val_loader: Any,
        link: str,
        n_samples: int,
        progress_bar: bool | None,
        loss: Loss | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        log_prior_prec_base: float = 10.0,
        grid_size: int = 100,
    ) -> Settings:
        """Return the settings with the best scalar prior precision of a logarithmic grid.

        Raises:
            ValueError: If the structure is not a scalar, or the validation loader is missing, empty
                or without labels.
        """
        _check_scalar("a grid search", structure)
        grid = torch.logspace(
            log_prior_prec_min, log_prior_prec_max, grid_size, base=log_prior_prec_base
        )
        scalar = with_first_precision(self.posterior)
        with self._together(val_loader) as team:
            scoring = scoring_of(self.posterior, link, n_samples, team=team)
            options = (grid, scoring, loss, progress_bar, team)
            best, _ = grid_search(Predictor(scalar), val_loader, *options)
        prior = torch.as_tensor([best], device=scalar.device, dtype=scalar.dtype)
        return replace(self.posterior.settings, prior_precision=prior)

    def descent(
        self,
        structure: PriorStructure,
        val_loader: Any,
        link: str,
        n_samples: int,
        progress_bar: bool | None,
        n_steps: int = 100,
        lr: float = 0.1,
    ) -> Settings:
        """Return the settings at the end of a descent on the validation NLL.

        Raises:
            ValueError: If the structure is unknown, or the validation loader is missing, empty or
                without labels.
        """
        groups = prior_groups(self.posterior.names, structure)
        kind: Any = CoupledCache if couples(self.posterior, groups) else ValidationCache
        predictor = Predictor(self.posterior)
        with self._together(val_loader) as team:
            scoring = scoring_of(self.posterior, link, n_samples, team=team)
            options = (groups, scoring.readout, progress_bar)
            cache = kind(predictor, val_loader, *options, team=team)
            factors = descend(cache, groups, scoring, n_steps, lr)
        return with_precisions(self.posterior, self.posterior.prior_by_tensor * factors, groups)

    def calibrate(
        self,
        val_loader: Any,
        link: str,
        n_samples: int,
        generator: torch.Generator | None,
        progress_bar: bool | None,
    ) -> tuple[Settings, Calibration]:
        """Return calibrated settings, and what they changed, see `calibrate`."""
        objective = self.posterior.objective
        if not objective.can_be_calibrated:
            raise ValueError(
                f"calibrate needs a classifier or a regression; tune a {objective.name} posterior "
                "by optimize_prior_precision(method='widest')"
            )
        if labels_tokens(objective) or objective.has_spans:
            if link != QUADRATURE:
                raise ValueError(
                    f"a {objective.name} posterior is calibrated for predictions by samples, "
                    f"link_approx={QUADRATURE!r}; got {link!r}"
                )
            with self._together(val_loader) as team:
                options = (val_loader, team, generator, progress_bar)
                return calibrate_by_samples(self.posterior, *options)
        sampled = takes_samples(self.posterior, CHEAPER, link, None, generator)
        if sampled and not objective.has_independent_labels:
            if isinstance(val_loader, Iterator):
                val_loader = list(val_loader)  # exact moments would read it again
            try:
                with self._together(val_loader) as team:
                    options = (val_loader, team, generator, progress_bar)
                    return calibrate_by_samples(self.posterior, *options)
            except (NoForwardDerivativeError, OtherProcessFailed) as error:
                if kind_of(error) != NoForwardDerivativeError.__name__:
                    raise
                logger.info("calibrating exact moments, as predictions are: %s", error)
        predictor = Predictor(self.posterior)
        with self._together(val_loader) as team:
            scoring = scoring_of(self.posterior, link, n_samples, generator, team)
            return calibrate(predictor, val_loader, team, scoring, progress_bar)


def _check_scalar(method: str, structure: PriorStructure) -> None:
    if structure != "scalar":
        raise ValueError(
            f"{method} chooses a scalar; use method='marglik' or 'val_gd' for "
            f"prior_structure={structure!r}"
        )
