"""`TunedLaplace`: tuning and calibration under laplace-torch's signatures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from laplace_lora.data.distributed import is_sharded
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.posteriors.calibrated import CalibratedLaplace
from laplace_lora.tuning.default_way import by_default
from laplace_lora.tuning.groups import PriorStructure
from laplace_lora.tuning.left_out.profiled_noise import warn_if_noise_is_off
from laplace_lora.tuning.options import (
    check_evidence_options,
    check_loaders,
    check_options,
    check_predictive,
)
from laplace_lora.tuning.outcome import Tuning
from laplace_lora.tuning.tuner import Found, Request, Tuner
from laplace_lora.tuning.width_check import warn_if_wide

TUNED_ON_TRAINING_DATA = ("loo", "widest")


class TunedLaplace(CalibratedLaplace):
    """Calls of laplace-torch whose work is done by `Tuner`, or by its own loops where asked for."""

    _tuning: Tuning | None = None
    _leaves_correction_out = False  # as the fit was told

    @property
    def tuning(self) -> Tuning | None:
        """What the tuning of the present prior did; ``None`` if the prior was set otherwise."""
        tuning, present = self._tuning, self.prior_precision.detach()
        if tuning is None or tuning.prior_precision.shape != present.shape:
            return None
        return tuning if torch.equal(tuning.prior_precision.to(present), present) else None

    @in_full_precision
    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "auto",
        *,
        prior_structure: PriorStructure = "scalar",
        val_loader: Any = None,
        train_loader: Any = None,
        link_approx: str = QUADRATURE,
        n_samples: int = 100,
        tune_sigma_noise: bool = False,
        correction: bool | None = None,
        recentre: bool = True,
        progress_bar: bool | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        """Tune the prior precision; undoes an earlier `calibrate` or `recentre`.

        What it did is in `tuning`.

        * ``"auto"``: for language models and token classifiers ``"widest"``, for others ``"loo"``
          where a scalar is asked for and `leave_one_out.why_not` has no objection; otherwise
          ``"marglik"``, and with a warning where the fit's loader does not give its data again.
        * ``"loo"``: the best leave-one-out likelihood of the training labels, in one pass over the
          training data: those of the fit, as long as this process keeps them, or
          ``train_loader``, a random thousand of them where they are many. For classifiers,
          regressions and reward models. Moves the posterior's mean where training stopped too
          early, see `recentre`.
        * ``"widest"``: for models of tokens, the prior of the plain evidence with its covariance
          scaled down until some training texts are predicted at most 0.0025 nats per token worse
          than by the MAP, see `widest`.
        * ``"marglik"``: the exact maximum of the marginal likelihood, from eigenvalues alone. With
          ``n_steps``, ``lr`` or ``init_prior_prec``: laplace-torch's Adam on the evidence without
          its gradient term instead.
        * ``"gridsearch"``: a scalar from a logarithmic grid, in one pass over ``val_loader``; with
          ``loss``, ``log_prior_prec_min``, ``log_prior_prec_max``, ``log_prior_prec_base`` and
          ``grid_size`` as in laplace-torch.
        * ``"val_gd"``: gradient descent on the validation NLL from the present prior, in one pass
          over ``val_loader``; with ``n_steps`` (100) and ``lr`` (0.1).

        Args:
            pred_type: Predictive that a grid search scores, ``"glm"`` or ``"nn"``.
            method: ``"auto"``, ``"loo"``, ``"widest"``, ``"marglik"``, ``"gridsearch"`` or
                ``"val_gd"``.
            prior_structure: Which tensors share a precision, see `prior_groups`; ``"auto"`` takes
                the structure with the largest evidence, see `choose_structure`.
            val_loader: Validation batches with labels.
            train_loader: For ``"auto"``, ``"loo"``, ``"widest"`` and ``"marglik"``: the training
                data, if not those of the fit in this process.
            link_approx: Link of the predictive that is scored.
            n_samples: Samples for ``"mc"``, common to all priors compared.
            tune_sigma_noise: For ``"loo"`` and ``"marglik"`` of a regression: also the
                observation noise.
            correction: For ``"marglik"``: take in the gradient term that the evidence has because
                trained weights are no mode of the prior; measured in passes over the training data
                the first time. ``None`` does where it can, and warns where it cannot.
            recentre: For ``"auto"`` and ``"loo"``: whether the posterior's mean may move.
            progress_bar: Whether to show progress, see `progress`.
            verbose: Print the result.
            **kwargs: As listed with the methods.

        Raises:
            AttributeError: If the posterior has not been fitted.
            TypeError: If an argument is none of the method's.
            ValueError: If method, structure, type or link is unknown or they do not go together,
                there are no samples, an argument belongs to another method, the validation loader
                is missing, empty or without labels, or leave-one-out is asked for where it is
                impossible.

        Warns:
            UserWarning: If the marginal likelihood made the posterior so wide that it predicts its
                training data worse than the MAP by more than 0.1 nats, lacks its gradient term, or
                stands in for ``"widest"``; or if a regression's noise is 1 where the residuals are
                three times larger or smaller.
        """
        self._check_H_init()
        self._weights_watch.look_again()
        if self.structure.scalar_only and prior_structure != "scalar":
            raise ValueError(
                f"a full matrix cannot have prior_structure={prior_structure!r}; use 'scalar', or "
                "a Kron or diagonal posterior"
            )
        method = str(getattr(method, "value", method))  # laplace-torch's enumeration
        check_options(method, kwargs)
        check_predictive(pred_type, link_approx, n_samples)
        by_laplace_torch = bool(kwargs) or prior_structure == "diag"
        asked_for = (tune_sigma_noise, correction, recentre)
        check_evidence_options(method, *asked_for, by_laplace_torch)
        if tune_sigma_noise and not self.fitted.objective.has_noise:
            raise ValueError("only a regression has observation noise to tune")
        given = train_loader is not None
        check_loaders(method, val_loader, given)
        request = Request(
            prior_structure,
            train_loader if given else self._train_loader,
            given,
            progress_bar,
            recentre,
            tune_sigma_noise,
        )
        validation = (val_loader, link_approx, n_samples, progress_bar)
        before, tuning_before = self.state, self._tuning
        try:
            self.state = before.with_settings(before.settings.untuned())
            reason, found = "", None
            if method == "auto":
                others = bool(kwargs) or correction is not None
                method, reason, found = by_default(Tuner(self.fitted), request, others)
                if self.fitted.objective.predicts_tokens:  # nor does it help these
                    correction = correction or False
            if found is None:
                own = (pred_type == "nn", by_laplace_torch, kwargs)
                found = self._found(method, request, correction, validation, *own)
            settings, reports = found
            self.state = self.state.with_settings(settings)
            precision = self.prior_precision.detach().clone()
            self._tuning = Tuning(method, precision, reason, **reports)
            if method == "marglik" and request.loader is not None:
                warn_if_wide(self.fitted, request.loader)
            if not (tune_sigma_noise and method == "loo"):  # which knows of no better one
                warn_if_noise_is_off(self.fitted)
        except BaseException:
            self.state = before  # laplace-torch's own loops write while they search
            self._tuning = tuning_before
            raise
        if verbose:
            print(self.tuning)

    def _found(
        self,
        method: str,
        request: Request,
        correction: bool | None,
        validation: tuple[Any, str, int, bool | None],
        samples_weights: bool,
        by_laplace_torch: bool,
        kwargs: dict[str, Any],
    ) -> Found:
        """Return the settings and reports of a method, from the untuned posterior."""
        tuner, structure = Tuner(self.fitted), request.structure
        if method in TUNED_ON_TRAINING_DATA:
            return tuner.by_training_data(method, request)
        if method == "val_gd":
            return tuner.descent(structure, *validation, **kwargs), {}
        if method == "gridsearch" and not samples_weights:
            return tuner.grid_search(structure, *validation, **kwargs), {}
        if method == "gridsearch":
            self._laplace_grid(validation[0], validation[2], kwargs)
            return self.state.settings, {}
        if by_laplace_torch:
            self._laplace_marglik(structure, kwargs)
            return self.state.settings, {}
        corrected = self._measures_term(correction, request.loader, request.progress_bar)
        return Tuner(self.fitted).marginal_likelihood(structure, request.tune_noise, corrected)

    def _measures_term(
        self, correction: bool | None, train_loader: Any, progress_bar: bool | None
    ) -> bool:
        """Measure the evidence's gradient term where it is wanted; return whether it is known."""
        unwanted = correction is None and self._leaves_correction_out
        if correction is False or unwanted:
            return False
        try:
            self.measure_gradient_term(train_loader, progress_bar)
        except ValueError as error:
            if correction:
                raise
            warn(
                f"the prior is tuned without a part of the evidence, and may be far too weak: "
                f"{error}",
            )
            return False
        return True

    def _laplace_marglik(self, structure: PriorStructure, kwargs: dict[str, Any]) -> None:
        with _link_is_known():
            super().optimize_prior_precision("glm", "marglik", prior_structure=structure, **kwargs)

    def _laplace_grid(self, val_loader: Any, n_samples: int, kwargs: dict[str, Any]) -> None:
        self.fitted.engine.check_outputs_few()
        if is_sharded(val_loader):
            raise ValueError(
                "a grid search by sampled weights (pred_type='nn') takes data that every process "
                "has whole; use pred_type='glm', whose data processes may share"
            )
        if self.fitted.objective.has_independent_labels:
            raise ValueError(
                "a grid search by sampled weights (pred_type='nn') is laplace-torch's, which knows "
                "no independent labels; use pred_type='glm'"
            )
        by_example = self.fitted.by_example
        data = val_loader if val_loader is None else list(map(by_example, val_loader))
        options = {"val_loader": data, "n_samples": n_samples, "link_approx": "mc"}
        with _link_is_known():
            super().optimize_prior_precision("nn", "gridsearch", **options, **kwargs)


@contextmanager
def _link_is_known() -> Iterator[None]:
    """Leave out what laplace-torch says of links: evidence has none, and sampled weights one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "By default `link_approx`", UserWarning)
        yield
