"""How likely the labels of texts are, under samples of several widths: of tokens or of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.quadrature import averaged_at
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.predictive.spans import span_tangents
from laplace_lora.structures.posterior import Posterior


def class_log_probabilities(
    posterior: Posterior, samples: LinearSamples, batch: Mapping[str, Any], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log probabilities of a batch's labels under posteriors of several widths, in one pass.

    Args:
        posterior: Of a token classifier or a question-answering model.
        samples: Of its weights.
        batch: Texts with the labels that count, as `Likelihood.split` gives them; those of
            questions that do not count are `IGNORED`.
        scales: Factors of the covariance of the weights, ``(scales,)``.

    Returns:
        Under the posterior's mean, ``(n,)``, and under each predictive, ``(scales, n)``, of ``n``
        labelled tokens or questions.

    Raises:
        NoForwardDerivativeError: If the model cannot carry tangents.
    """
    labels = batch["labels"]
    if posterior.objective.has_spans:
        readout, (mean, tangents) = LOGITS, span_tangents(samples, batch)
        counts = (labels != IGNORED).all(1)
        labels = labels[counts]
        mean, tangents = mean[counts.to(mean.device)], tangents[:, counts.to(mean.device)]
    else:
        readout, (mean, tangents) = CONTRASTS, samples.tangents(batch, CONTRASTS)
        labels = labels[labels != IGNORED]
    labels = labels.to(mean.device)
    rows = [
        averaged_at(samples.log_softmax(mean, width * tangents, readout), labels)
        for width in scales.sqrt().tolist()
    ]
    return averaged_at(readout.log_softmax(mean).unsqueeze(0), labels), torch.stack(rows)
