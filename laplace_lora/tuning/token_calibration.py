"""Calibrating a token classifier's posterior on labelled texts.

Samples of the linearised model are linear in their deviation from the MAP, so one pass over the
texts gives the predictive at every width and temperature. The prior stays as it is: its factor
would do what the width does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.links import averaged
from laplace_lora.predictive.linear_samples import SAMPLES, LinearSamples
from laplace_lora.predictive.token_class_predictions import at_tokens
from laplace_lora.structures.settings import Settings
from laplace_lora.structures.state import Posterior
from laplace_lora.tuning.calibration import Calibration
from laplace_lora.tuning.calibration_error import expected_calibration_error
from laplace_lora.tuning.calibration_search import exponential, search
from laplace_lora.tuning.validation_cache import labelled_batches, validation_rows

WIDTHS = (1.0, 0.7)  # of the priors: log scale, log temperature
AT_ONCE = 2**22  # numbers of the samples' logits that are in memory at once


@dataclass(frozen=True)
class _Tokens:
    """The labelled tokens of a validation set.

    Attributes:
        mean: Contrasts of their logits at the MAP, ``(tokens, contrasts)``.
        tangents: Their change along each direction, ``(directions, tokens, contrasts)``.
        y: Labels, ``(tokens,)``.
        texts: Number of each one's text.
    """

    mean: Tensor
    tangents: Tensor
    y: Tensor
    texts: Tensor

    def parts(self) -> Iterator[slice]:
        """Yield slices of the tokens that fit into memory with all their samples."""
        size = max(1, AT_ONCE // (2 * len(self.tangents) * self.mean.shape[1]))
        for first in range(0, len(self.y), size):
            yield slice(first, first + size)


def calibrate_tokens(
    posterior: Posterior,
    loader: Any,
    team: Together,
    generator: torch.Generator | None,
    progress_bar: bool,
) -> tuple[Settings, Calibration]:
    """Choose covariance scale and likelihood temperature by the NLL of labelled tokens.

    As `calibrate` does for other classifiers, see `search`; the tokens of a text are in one fold.

    Args:
        posterior: A fitted token classifier's; its present settings are the start.
        loader: Validation batches with labels.
        team: The processes that share the loader.
        generator: Source of the samples; a fixed seed by default.
        progress_bar: Show progress over the batches.

    Returns:
        The settings, and what they changed; NLL and ECE are per labelled token.

    Raises:
        ValueError: If there is no loader, no token is labelled, or the model cannot carry tangents.
    """
    settings = posterior.settings
    bare = replace(settings, covariance_scale=1.0, likelihood_temperature=1.0)
    samples = LinearSamples(posterior.with_settings(bare), SAMPLES, generator)
    tokens = _labelled(posterior, samples, loader, team, progress_bar)
    start = (math.log(settings.covariance_scale), math.log(settings.likelihood_temperature))

    def log_probabilities(point: Any, part: slice) -> Tensor:
        scale, temperature = (exponential(value) for value in point)
        mean, tangents = tokens.mean[part], tokens.tangents[:, part]
        slopes = tangents * (math.sqrt(scale) / temperature)
        return averaged(samples.log_softmax(mean / temperature, slopes, CONTRASTS))

    def losses(point: Any) -> Tensor:
        return torch.cat(
            [
                -log_probabilities(point, part).gather(1, tokens.y[part, None]).squeeze(1)
                for part in tokens.parts()
            ]
        )

    def ece(point: Any) -> float:
        log_p = torch.cat([log_probabilities(point, part) for part in tokens.parts()])
        return expected_calibration_error(log_p.exp(), tokens.y)

    candidates = [
        (scale * math.log(10), temperature)
        for scale in (-3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5)
        for temperature in (-0.7, -0.35, 0.0, 0.35, 0.7)
    ]
    found = search(losses, start, candidates, WIDTHS, tokens.texts)
    scale, temperature = (exponential(value) for value in found.best)
    chosen = replace(settings, covariance_scale=scale, likelihood_temperature=temperature)
    report = Calibration(
        chosen.prior_precision,
        scale,
        temperature,
        found.before,
        found.after,
        found.cross_fitted,
        ece(start),
        ece(found.best),
    )
    return chosen, report


def _labelled(
    posterior: Posterior, samples: LinearSamples, loader: Any, team: Together, progress_bar: bool
) -> _Tokens:
    """Return the labelled tokens of all processes, text by text."""
    means, slopes, labels = [], [], []
    for x, y in labelled_batches(posterior, loader, team, progress_bar):
        mean, tangents = samples.tangents(x, CONTRASTS)
        counted = y != IGNORED
        means.append(at_tokens(counted, mean))
        slopes.append(at_tokens(counted, tangents.transpose(0, 1)))
        labels.append(y)
    width = max(team.all_of(max((y.shape[1] for y in labels), default=0)))

    def wide(value: Tensor, fill: int = 0) -> Tensor:
        sides = (0, 0) * (value.ndim - 2)
        return F.pad(value, (*sides, 0, width - value.shape[1]), value=fill)

    rows = validation_rows(
        team,
        mean=[wide(mean) for mean in means],
        tangents=[wide(slope) for slope in slopes],
        y=[wide(y, IGNORED) for y in labels],
    )
    y = rows["y"]
    texts, places = (y != IGNORED).nonzero(as_tuple=True)
    if not len(texts):
        raise ValueError("no token of the validation data has a label that counts: all are -100")
    at = (texts, places)
    return _Tokens(rows["mean"][at], rows["tangents"][at].transpose(0, 1), y[at], texts)
