"""Calibrating a classifier's or a regression's posterior on a validation set.

Three numbers, chosen together on the validation NLL from one cached pass: a factor of the prior
precision, a scale of the predictive covariance and a temperature of the likelihood, or a
regression's observation noise; of a recentred posterior a fourth, how far its mean has moved. Fifty
labels fit three numbers all too well, so each has a Gaussian prior around its present value, and
what labels leave open is averaged over, see `calibration_search`.
Marginal likelihood can miss the width of a posterior severalfold where the model is misspecified; a
few hundred labels correct that.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.display.plots import change_figure
from laplace_lora.display.results import Columns, Result
from laplace_lora.display.tables import plain, span
from laplace_lora.likelihoods.base import Scoring
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.validation.cache import ValidationCache, validation_rows
from laplace_lora.tuning.validation.cached_rows import CachedRows, CachedTargets
from laplace_lora.tuning.validation.calibration_search import (
    Found,
    LabelledRows,
    Point,
    exponential,
    search_some,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = (2.0, 1.0, 0.7, 1.0)  # of the priors: log factor, scale, temperature or noise; step


@dataclass(frozen=True)
class Calibration(Result):
    """What a calibration chose, and what it changed on the validation set.

    Attributes:
        prior_precision: The new prior precision, scalar or one value a tensor.
        covariance_scale: Factor of the predictive covariance.
        likelihood_temperature: What logits are divided by before the softmax.
        nll_before: Mean validation NLL before, in nats.
        nll_after: And after; on the rows that the choice was made from.
        nll_cross_fitted: After, each fifth of the rows under the values chosen from the others:
            what to expect on new data. Not a number of a single row, or of tokens of a single text,
            for which no others can choose.
        ece_before: Expected calibration error before, 15 equal-width bins, a fraction; of a
            regression how far the shares of targets below quantiles are from the quantiles' levels.
        ece_after: And after.
        sigma_noise: Standard deviation of a regression's observation noise; ``None`` of others.
    """

    prior_precision: Tensor
    covariance_scale: float
    likelihood_temperature: float
    nll_before: float
    nll_after: float
    nll_cross_fitted: float
    ece_before: float
    ece_after: float
    sigma_noise: float | None = None

    @classmethod
    def of(
        cls,
        settings: Settings,
        rows: LabelledRows,
        start: Point,
        found: Found,
        noise: float | None = None,
    ) -> Calibration:
        """Return what was chosen, and what it changed on some rows.

        Args:
            settings: The choice.
            rows: The validation set.
            start: The point before.
            found: What the search for a better one found.
            noise: Of a regression.
        """
        return cls(
            settings.prior_precision.detach().clone(),
            settings.covariance_scale,
            settings.likelihood_temperature,
            found.before,
            found.after,
            found.cross_fitted,
            rows.ece(start),
            rows.ece(found.best),
            noise,
        )

    def __str__(self) -> str:
        expected = f" ({self.nll_cross_fitted:.4f} cross-fitted)" if self._is_cross_fitted else ""
        return (
            f"{self._chosen()}: validation NLL {self.nll_before:.4f} -> {self.nll_after:.4f}"
            f"{expected}, ECE {self.ece_before:.4f} -> {self.ece_after:.4f}"
        )

    def plot(self) -> Figure:
        """Draw validation NLL and calibration error before and after.

        Raises:
            ImportError: If matplotlib is missing.
        """
        names, nll = ["before", "after"], [self.nll_before, self.nll_after]
        ece = [self.ece_before, self.ece_after]
        panels = [("calibration error", names, ece)]
        if self._is_cross_fitted:
            names, nll = [*names, "cross-fitted"], [*nll, self.nll_cross_fitted]
        return change_figure([("validation NLL in nats", names, nll), *panels])

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name; the prior precision as a list, and no number as None."""
        cross_fitted = self.nll_cross_fitted if self._is_cross_fitted else None
        values = {**asdict(self), "nll_cross_fitted": cross_fitted}
        return {name: plain(value) for name, value in values.items()}

    @property
    def _is_cross_fitted(self) -> bool:
        return not math.isnan(self.nll_cross_fitted)

    def _table(self) -> tuple[Columns, str, None]:
        rows = [
            ("NLL", self.nll_before, self.nll_after),
            ("NLL, cross-fitted", self.nll_before, self.nll_cross_fitted),
            ("ECE", self.ece_before, self.ece_after),
        ]
        known = [row for row in rows if not math.isnan(row[2])]
        columns = zip(("validation", "before", "after"), zip(*known, strict=True), strict=True)
        return {name: list(values) for name, values in columns}, self._chosen(), None

    def _chosen(self) -> str:
        last = f"likelihood temperature {self.likelihood_temperature:.3g}"
        if self.sigma_noise is not None:
            last = f"observation noise {self.sigma_noise:.3g}"
        return (
            f"prior precision {span(self.prior_precision, 3)}, covariance scale "
            f"{self.covariance_scale:.3g}, {last}"
        )


def calibrate(
    predictor: Predictor, loader: Any, team: Together, scoring: Scoring, progress_bar: bool | None
) -> tuple[Settings, Calibration]:
    """Choose prior factor, covariance scale, and likelihood temperature or observation noise.

    Their logarithms have priors around their present values, with widths of 2, 1 and 0.7; the last
    number is a multiple of the present shift, with a width of 1. Chosen is the point whose
    predictions are nearest to the average over the numbers' posterior; every candidate sees the
    same samples. Of many rows some are searched, and all are scored.

    Args:
        predictor: Of a fitted posterior, a classifier's or a regression's; its present settings are
            the start.
        loader: Validation batches with labels.
        team: The processes that share the loader.
        scoring: How predictions are scored.
        progress_bar: Whether to show progress, see `progress`.

    Returns:
        The settings, and what they changed.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """
    posterior = predictor.posterior
    settings = posterior.settings
    groups = torch.zeros(len(posterior.names), dtype=torch.long)
    unmoved: list[Tensor] = []

    def watch(x: Any, y: Tensor) -> None:
        if settings.shift is not None:
            unmoved.append(predictor.unmoved_mean(x, scoring.readout))

    cache = ValidationCache(predictor, loader, groups, scoring.readout, progress_bar, watch, team)
    centre, here = cache.mean, (0.0, math.log(settings.covariance_scale))
    has_noise = posterior.objective.has_noise
    start: tuple[float, ...] = (*here, math.log(settings.likelihood_temperature))
    if settings.shift is not None:
        centre = validation_rows(team, unmoved=unmoved)["unmoved"]
        start = (*start, 1.0)
    noise = float(settings.sigma_noise.detach())
    rows: CachedRows | CachedTargets = CachedRows(cache, centre, scoring)
    if has_noise:
        rows = CachedTargets(cache, centre, noise, start)
    found = search_some(rows, start, WIDTHS[: len(start)])
    best = found.best
    factor, scale, third = (exponential(value) for value in best[:3])
    noise, temperature = (noise * third, 1.0) if has_noise else (noise, third)
    chosen = replace(
        settings,
        prior_precision=settings.prior_precision * factor,
        sigma_noise=settings.sigma_noise.new_tensor(noise),
        covariance_scale=scale,
        likelihood_temperature=temperature,
        shift=None if settings.shift is None else settings.shift * float(best[3]),
    )
    return chosen, Calibration.of(chosen, rows, start, found, noise if has_noise else None)
