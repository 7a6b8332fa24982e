"""`PriorTuning`: the part of a posterior class that chooses its own hyperparameters.

Which method to run, what goes with it, and putting everything back if it fails. The methods are
`evidence`'s, `prior`'s and `calibration`'s.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_lora.curvature.backends import LoraCurvature
from laplace_lora.tuning.calibration import Calibration, calibrate
from laplace_lora.tuning.evidence import Spectrum, optimal_noise, optimal_precision
from laplace_lora.tuning.groups import Structure, prior_groups
from laplace_lora.tuning.validation_cache import Scoring, ValidationCache
from laplace_lora.tuning.validation_search import descend, grid_search

CALIBRATED = ("covariance_scale", "likelihood_temperature")
SETTINGS = ("_prior_precision", "_sigma_noise", *CALIBRATED)


class PriorTuning(ParametricLaplace):
    """Tuning half of a posterior; subclasses give the eigenvalues of each tensor's curvature."""

    backend: LoraCurvature
    loss: float
    n_data: int
    sigma_noise: Any
    covariance_scale: float
    likelihood_temperature: float
    _norms: tuple[Any, Any, Tensor] | None = None

    def by_example(self, batch: Any) -> Any:
        """Return a batch in the form in which every row is an example."""
        raise NotImplementedError

    def block_spectra(self) -> list[Spectrum]:
        """Return each tensor's curvature eigenvalues, with how often each counts."""
        raise NotImplementedError

    def validation_cache(
        self, loader: DataLoader | None, groups: Tensor, progress_bar: bool
    ) -> Any:
        """Return what a validation set says about any prior, see `ValidationCache`."""
        return ValidationCache(self, loader, groups, progress_bar)

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        *,
        prior_structure: Structure = "scalar",
        val_loader: DataLoader | None = None,
        link_approx: str = "probit",
        n_samples: int = 100,
        tune_sigma_noise: bool = False,
        progress_bar: bool = False,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        """Tune the prior precision; undoes an earlier `calibrate`.

        * ``"marglik"``: the exact maximum of the marginal likelihood, from eigenvalues alone. With
          ``n_steps``, ``lr`` or ``init_prior_prec``: laplace-torch's Adam instead.
        * ``"gridsearch"``: a scalar from a logarithmic grid, in one pass over ``val_loader``; with
          ``loss``, ``log_prior_prec_min``, ``log_prior_prec_max``, ``log_prior_prec_base`` and
          ``grid_size`` as in laplace-torch.
        * ``"val_gd"``: gradient descent on the validation NLL from the present prior, in one pass
          over ``val_loader``; with ``n_steps`` (100) and ``lr`` (0.1).

        Args:
            pred_type: Predictive that a grid search judges, ``"glm"`` or ``"nn"``.
            method: ``"marglik"``, ``"gridsearch"`` or ``"val_gd"``.
            prior_structure: Which tensors share a precision, see `prior_groups`.
            val_loader: Validation batches with labels.
            link_approx: Link of the predictive to be judged.
            n_samples: Samples for ``"mc"``, common to all priors compared.
            tune_sigma_noise: For ``"marglik"`` of a regression: also the observation noise.
            progress_bar: Show progress over the batches.
            verbose: Print the result.
            **kwargs: As listed with the methods.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If the method or structure is unknown or do not go together, or the
                validation loader is missing, empty or without labels.
        """
        self._check_H_init()
        earlier = {name: getattr(self, name) for name in SETTINGS}
        self.covariance_scale = self.likelihood_temperature = 1.0
        try:
            if method == "marglik":
                self._maximise_evidence(prior_structure, tune_sigma_noise, val_loader, kwargs)
            elif method == "gridsearch" and pred_type == "nn":
                data = val_loader if val_loader is None else list(map(self.by_example, val_loader))
                options = {"val_loader": data, "n_samples": n_samples, "link_approx": "mc"}
                super().optimize_prior_precision("nn", method, **options, **kwargs)
            elif method == "gridsearch":
                scoring = Scoring.of(self, link_approx, n_samples)
                self._search_grid(prior_structure, val_loader, scoring, progress_bar, **kwargs)
            elif method == "val_gd":
                scoring = Scoring.of(self, link_approx, n_samples)
                self._descend(prior_structure, val_loader, scoring, progress_bar, **kwargs)
            else:
                raise ValueError(
                    f"method must be 'marglik', 'gridsearch' or 'val_gd', got {method!r}"
                )
        except BaseException:
            self.prior_precision = earlier["_prior_precision"]
            for name, value in earlier.items():
                setattr(self, name, value)
            raise
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")

    def calibrate(
        self,
        val_loader: DataLoader,
        link_approx: str = "probit",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> Calibration:
        """Choose prior, width and temperature of a classifier's predictive on a validation set.

        One pass over the data; afterwards ``la(batch)`` uses what was chosen. Calibrate for the
        link that you will predict with.

        Args:
            val_loader: Validation batches with labels.
            link_approx: Link of the predictive.
            n_samples: Samples for ``"mc"``, common to all candidates.
            generator: Source of these samples.
            progress_bar: Show progress over the batches.

        Returns:
            The values chosen, and validation NLL and ECE before and after; NLL is never worse.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If it is not a classifier's, or the loader is empty or without labels.
        """
        self._check_H_init()
        scoring = Scoring.of(self, link_approx, n_samples, generator)
        return calibrate(self, val_loader, scoring, progress_bar)

    def state_dict(self) -> dict[str, Any]:
        """Return laplace-torch's state, with what a calibration chose."""
        return {**super().state_dict(), **{name: getattr(self, name) for name in CALIBRATED}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a posterior of the same class over the same weights."""
        super().load_state_dict(state_dict)
        for name in CALIBRATED:
            setattr(self, name, state_dict.get(name, 1.0))

    @property
    def block_names(self) -> list[str]:
        """Names of the trainable tensors, in parameter order."""
        return [block.name for block in self.backend.blocks]

    @property
    def scatter(self) -> Tensor:
        """``(θ − μ₀)ᵀ P₀ (θ − μ₀)`` of the evidence, a float64 scalar."""
        prior = self.prior_precision.double()
        if len(prior) not in (1, self.n_layers):
            return ((self.mean - self.prior_mean).double().square() * prior).sum()
        return (prior * self._squared_norms()).sum()

    def _maximise_evidence(
        self,
        structure: Structure,
        tune_sigma_noise: bool,
        val_loader: DataLoader | None,
        kwargs: dict[str, Any],
    ) -> None:
        if val_loader is not None:
            raise ValueError("method='marglik' uses no validation data; leave `val_loader` out")
        if tune_sigma_noise and self.likelihood != "regression":
            raise ValueError("only a regression has observation noise to tune")
        if kwargs or structure == "diag":
            with warnings.catch_warnings():
                # laplace-torch speaks of links, which evidence does not involve.
                warnings.filterwarnings("ignore", "By default `link_approx`", UserWarning)
                super().optimize_prior_precision(
                    "glm", "marglik", prior_structure=structure, **kwargs
                )
            return
        groups = prior_groups(self.block_names, structure).to(self._device)
        squares = self._squared_norms()
        if tune_sigma_noise:
            at_unit_noise = [
                [(e * self.sigma_noise.square(), times) for e, times in spectrum]
                for spectrum in self.block_spectra()
            ]
            self.sigma_noise = optimal_noise(
                lambda noise: [[(e / noise**2, n) for e, n in s] for s in at_unit_noise],
                squares,
                groups,
                self.loss / self.temperature,
                self.n_data * self.n_outputs,
                float(self.sigma_noise),
            )
        self._set_precisions(
            optimal_precision(self.block_spectra(), squares, groups)[groups], groups
        )

    def _search_grid(
        self,
        structure: Structure,
        val_loader: DataLoader | None,
        scoring: Scoring,
        progress_bar: bool,
        loss: Any = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        log_prior_prec_base: float = 10.0,
        grid_size: int = 100,
    ) -> None:
        if structure != "scalar":
            raise ValueError(
                "a grid search chooses a scalar; use method='marglik' or 'val_gd' for "
                f"prior_structure={structure!r}"
            )
        grid = torch.logspace(
            log_prior_prec_min, log_prior_prec_max, grid_size, base=log_prior_prec_base
        )
        best, _ = grid_search(self, val_loader, grid, scoring, loss, progress_bar)
        self.prior_precision = best

    def _descend(
        self,
        structure: Structure,
        val_loader: DataLoader | None,
        scoring: Scoring,
        progress_bar: bool,
        n_steps: int = 100,
        lr: float = 0.1,
    ) -> None:
        groups = prior_groups(self.block_names, structure)
        precisions = descend(self, val_loader, groups, scoring, n_steps, lr, progress_bar)
        self._set_precisions(precisions, groups)

    def _set_precisions(self, precisions: Tensor, groups: Tensor) -> None:
        one = int(groups.max()) == 0 and bool((precisions == precisions[0]).all())
        self.prior_precision = precisions[:1] if one else precisions

    def _squared_norms(self) -> Tensor:
        """Return each tensor's ``‖θ − μ₀‖²``, computed once for a mean and a prior mean."""
        kept = self._norms
        if kept is None or kept[0] is not self.mean or kept[1] is not self.prior_mean:
            squares = (self.mean - self.prior_mean).double().square()
            sizes = [parameter.numel() for parameter in self.params]
            norms = torch.stack([part.sum() for part in squares.split(sizes)])
            self._norms = kept = (self.mean, self.prior_mean, norms)
        return kept[2]
