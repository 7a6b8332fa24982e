"""How likely the labels of texts are, under samples of several widths: of tokens or of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.quadrature import averaged
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.predictive.spans import span_tangents


def class_log_probabilities(
    samples: LinearSamples, batch: Mapping[str, Any], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log probabilities of a batch's labels under posteriors of several widths, in one pass.

    Args:
        samples: Of a token classifier's posterior.
        batch: Texts with the labels that count, as `Likelihood.split` gives them.
        scales: Factors of the covariance of the weights, ``(scales,)``.

    Returns:
        Under the posterior's mean, ``(labelled tokens,)``, and under each predictive, ``(scales,
        labelled tokens)``.

    Raises:
        NoForwardDerivativeError: If the model cannot carry tangents.
    """
    mean, tangents = samples.tangents(batch, CONTRASTS)
    labels = batch["labels"][batch["labels"] != IGNORED].to(mean.device).unsqueeze(1)
    own = F.log_softmax(F.pad(mean, (1, 0)), dim=-1).gather(1, labels).squeeze(1)
    rows = []
    for width in scales.sqrt().tolist():
        log_p = samples.log_softmax(mean, width * tangents, CONTRASTS)
        rows.append(averaged(log_p).gather(1, labels).squeeze(1))
    return own, torch.stack(rows)


def span_log_probabilities(
    samples: LinearSamples, batch: Mapping[str, Any], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log probabilities of a batch's answers under posteriors of several widths.

    Args:
        samples: Of a question-answering model's posterior.
        batch: Texts with their labels, as `Likelihood.split` gives them; those of texts that do not
            count are `IGNORED`.
        scales: Factors of the covariance of the weights, ``(scales,)``.

    Returns:
        Under the posterior's mean, ``(texts that count,)``, and under each predictive, ``(scales,
        texts that count)``.

    Raises:
        NoForwardDerivativeError: If the model cannot carry tangents.
    """
    mean, tangents = span_tangents(samples, batch)
    labels = batch["labels"].to(mean.device)
    counts = (labels != IGNORED).all(1)
    mean, tangents, labels = mean[counts], tangents[:, counts], labels[counts].unsqueeze(-1)
    own = mean.log_softmax(-1).gather(-1, labels).sum((1, 2))
    rows = []
    for width in scales.sqrt().tolist():
        log_p = samples.log_softmax(mean, width * tangents, LOGITS)
        rows.append(averaged(log_p.gather(-1, labels.expand(len(log_p), -1, -1, -1)).sum((2, 3))))
    return own, torch.stack(rows)
