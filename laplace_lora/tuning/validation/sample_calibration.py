"""Calibrating a posterior whose predictive comes from samples of the linearised model.

Samples are linear in their deviation from the MAP, so one pass over the data gives the predictive
at every width and temperature. The prior stays as it is: its factor would do what the width does.
Memory and time grow with rows times classes, those of exact moments with their square and cube.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.data.columns import padded
from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import CONTRASTS, labels_tokens
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.label_check import check_labels
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.question_answering import text_tokens
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.predictive.spans import span_tangents
from laplace_lora.predictive.token_class_predictions import at_tokens
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.validation.cache import labelled_batches, validation_rows
from laplace_lora.tuning.validation.calibration import Calibration
from laplace_lora.tuning.validation.calibration_search import exponential, search_some
from laplace_lora.tuning.validation.sampled_rows import SampledRows

WIDTHS = (1.0, 0.7)  # of the priors: log scale, log temperature
NEVER = -1e4  # logit of padding, and of tokens that a shorter batch does not have


def calibrate_by_samples(
    posterior: Posterior,
    loader: Any,
    team: Together,
    generator: torch.Generator | None,
    progress_bar: bool | None,
) -> tuple[Settings, Calibration]:
    """Choose covariance scale and likelihood temperature by the NLL of labels, see `search`.

    Args:
        posterior: A fitted posterior of a classifier, of examples or of tokens, or of a model of
            answers; its present settings are the start.
        loader: Validation batches with labels.
        team: The processes that share the loader.
        generator: Source of the samples; a fixed seed by default.
        progress_bar: Whether to show progress, see `progress`.

    Returns:
        The settings, and what they changed. NLL is per example, labelled token or answer, ECE of
        the classes, or of starts and ends. The tokens of a text are in one fold.

    Raises:
        ValueError: If there is no loader, nothing is labelled, or labels are none of the classes.
        NoForwardDerivativeError: If the model cannot carry tangents.
    """
    settings = posterior.settings
    start = (math.log(settings.covariance_scale), math.log(settings.likelihood_temperature))
    bare = replace(settings, covariance_scale=1.0, likelihood_temperature=1.0)
    samples = LinearSamples(posterior.with_settings(bare), None, generator)
    rows = _labelled(posterior, samples, loader, team, progress_bar)
    found = search_some(rows, start, WIDTHS)
    scale, temperature = (exponential(value) for value in found.best)
    chosen = replace(settings, covariance_scale=scale, likelihood_temperature=temperature)
    return chosen, Calibration.of(chosen, rows, start, found)


def _labelled(
    posterior: Posterior,
    samples: LinearSamples,
    loader: Any,
    team: Together,
    progress_bar: bool | None,
) -> SampledRows:
    """Return what is labelled in the data of all processes: examples, tokens or answers."""
    objective = posterior.objective
    readout = LOGITS if objective.has_spans else CONTRASTS
    means: list[Tensor] = []
    slopes: list[Tensor] = []
    labels: list[Tensor] = []
    for x, y in labelled_batches(posterior, loader, team, progress_bar):
        if objective.has_spans:
            mean, tangents = span_tangents(samples, x)
            # What is far below the text's own logits is not at every temperature.
            padding = ~text_tokens(x).to(mean.device)
            mean = mean.masked_fill(padding.unsqueeze(1), NEVER)
        else:
            mean, tangents = samples.tangents(x, readout)
            check_labels(objective, mean, y, readout)
        along = tangents.transpose(0, 1)
        if labels_tokens(objective):  # processes exchange rows of texts
            mean, along = at_tokens(y != IGNORED, mean), at_tokens(y != IGNORED, along)
        means.append(mean)
        slopes.append(along)
        labels.append(y)
    if objective.has_spans:
        width = team.longest(mean.shape[-1] for mean in means)
        means = [F.pad(mean, (0, width - mean.shape[-1]), value=NEVER) for mean in means]
        slopes = [F.pad(along, (0, width - along.shape[-1])) for along in slopes]
    elif labels_tokens(objective):
        width = team.longest(y.shape[1] for y in labels)
        means, slopes = ([padded(part, width) for part in parts] for parts in (means, slopes))
        labels = [padded(y, width, IGNORED) for y in labels]
    rows = validation_rows(team, mean=means, along=slopes, y=labels)
    mean, along, y = rows["mean"], rows["along"], rows["y"]
    groups = torch.arange(len(y), device=y.device)
    if labels_tokens(objective):
        at = (y != IGNORED).nonzero(as_tuple=True)
        mean, along, y, groups = mean[at], along[at], y[at], at[0]
        if not len(y):
            raise ValueError(
                "no token of the validation data has a label that counts: all are -100"
            )
    return SampledRows(samples, mean, along.transpose(0, 1), y, groups, readout)
