"""Calibrating the posterior of a token classifier or of a question-answering model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.data.columns import padded
from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import CONTRASTS
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
from laplace_lora.tuning.validation.sample_calibration import (
    SampledLabels,
    calibrate_by_samples,
    unscaled,
)

Labelled = Iterable[tuple[Any, Tensor]]
NEVER = -1e4  # logit of padding, and of tokens that a shorter batch does not have


def calibrate_tokens(
    posterior: Posterior,
    loader: Any,
    team: Together,
    generator: torch.Generator | None,
    progress_bar: bool | None,
) -> tuple[Settings, Calibration]:
    """Choose covariance scale and likelihood temperature by the NLL of labels, see `search`.

    Args:
        posterior: A fitted posterior of a model of tokens or spans; its present settings are the
            start.
        loader: Validation batches with labels.
        team: The processes that share the loader.
        generator: Source of the samples; a fixed seed by default.
        progress_bar: Whether to show progress, see `progress`.

    Returns:
        The settings, and what they changed. NLL is per labelled token or per answer, ECE of the
        tokens' classes, or of starts and ends. The tokens of a text are in one fold.

    Raises:
        ValueError: If there is no loader, nothing is labelled, labels are none of the classes, or
            the model cannot carry tangents.
    """
    samples = unscaled(posterior, generator)
    collect = _spans if posterior.objective.has_spans else _tokens
    batches = labelled_batches(posterior, loader, team, progress_bar)
    labelled = collect(posterior, samples, batches, team)
    return calibrate_by_samples(posterior, samples, labelled)


def _spans(
    posterior: Posterior, samples: LinearSamples, batches: Labelled, team: Together
) -> SampledLabels:
    """Return the answers of all processes."""
    means, slopes, labels = [], [], []
    for x, y in batches:
        mean, tangents = span_tangents(samples, x)
        # What is far below the text's own logits is not at every temperature.
        padding = ~text_tokens(x).to(mean.device)
        means.append(mean.masked_fill(padding.unsqueeze(1), NEVER))
        slopes.append(tangents.transpose(0, 1))
        labels.append(y)
    width = team.longest(mean.shape[-1] for mean in means)
    rows = validation_rows(
        team,
        mean=[F.pad(mean, (0, width - mean.shape[-1]), value=NEVER) for mean in means],
        tangents=[F.pad(slope, (0, width - slope.shape[-1])) for slope in slopes],
        y=labels,
    )
    texts = torch.arange(len(rows["y"]), device=rows["y"].device)
    return SampledLabels(rows["mean"], rows["tangents"].transpose(0, 1), rows["y"], texts, LOGITS)


def _tokens(
    posterior: Posterior, samples: LinearSamples, batches: Labelled, team: Together
) -> SampledLabels:
    """Return the labelled tokens of all processes, text by text."""
    means, slopes, labels = [], [], []
    for x, y in batches:
        mean, tangents = samples.tangents(x, CONTRASTS)
        check_labels(posterior.objective, mean, y, CONTRASTS)
        counted = y != IGNORED
        means.append(at_tokens(counted, mean))
        slopes.append(at_tokens(counted, tangents.transpose(0, 1)))
        labels.append(y)
    width = team.longest(y.shape[1] for y in labels)
    rows = validation_rows(
        team,
        mean=[padded(mean, width) for mean in means],
        tangents=[padded(slope, width) for slope in slopes],
        y=[padded(y, width, IGNORED) for y in labels],
    )
    y = rows["y"]
    texts, places = (y != IGNORED).nonzero(as_tuple=True)
    if not len(texts):
        raise ValueError("no token of the validation data has a label that counts: all are -100")
    at = (texts, places)
    tangents = rows["tangents"][at].transpose(0, 1)
    return SampledLabels(rows["mean"][at], tangents, y[at], texts, CONTRASTS)
