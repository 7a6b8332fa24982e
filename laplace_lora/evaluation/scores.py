"""Metrics of a report with their standard errors, from rows of predictions and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from laplace_lora.evaluation.conformal import set_metrics
from laplace_lora.evaluation.label_metrics import LABEL_METRICS, label_entropy
from laplace_lora.evaluation.metrics import METRICS, entropy, ood_auroc, ood_fpr95
from laplace_lora.evaluation.risk_control import ANSWERED, ERROR_RATE, answering_metrics
from laplace_lora.evaluation.token_rows import count_drawn, resamples
from laplace_lora.likelihoods.multilabel import MISSING, known_labels

Rows = Mapping[str, Tensor]
SETS = "sets"  # column with the classes of conformal sets
DETECTION = "OOD"  # how the names begin of metrics that tell out-of-distribution examples


def checked_labels(p: Tensor, y: Tensor) -> Tensor:
    """Return labels as metrics take them.

    Raises:
        ValueError: If labels are no integers, or lie outside the classes, or no independent one is
            known.
    """
    if y.ndim == 2:
        y = known_labels(y)
        if not bool((y != MISSING).any()):
            raise ValueError("no label of the data is known: all are -100 or NaN")
    elif y.is_floating_point():
        raise ValueError(f"labels of classes must be integers, got {y.dtype}; cast them to int64")
    elif int(y.min()) < 0 or int(y.max()) >= p.shape[1]:
        raise ValueError(f"labels must lie in 0..{p.shape[1] - 1}, got {y.min()} to {y.max()}")
    return y


def predictive_entropy(p: Tensor, y: Tensor) -> Tensor:
    """Return each example's entropy in nats; of independent labels, which ``y`` tells, the sum."""
    return entropy(p) if y.ndim == 1 else label_entropy(p)


def values_and_errors(
    rows: Rows, outside: Rows | None, bootstrap: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return every metric, and its standard error by bootstrap, NaN where there is none.

    Args:
        rows: Columns ``p``, ``labels``, and where there are any ``information``, `SETS` and
            `ANSWERED`.
        outside: Columns of out-of-distribution examples.
        bootstrap: Number of resamples.
        seed: Of the resamples.
    """
    p, y, information = rows["p"], rows["labels"], rows.get("information")
    generator = torch.Generator().manual_seed(seed)

    def resampled(some: Rows) -> Iterator[Tensor]:
        return resamples(some, bootstrap, generator)

    values = _of_rows(rows, torch.arange(len(p)))
    if not values.get(ANSWERED, 1):
        del values[ERROR_RATE]
    draws = [_of_rows(rows, i) for i in resampled(rows)]
    if outside is not None:
        other = outside.get("information")
        scores = {"": (predictive_entropy(p, y), predictive_entropy(outside["p"], y))}
        if information is not None and other is not None:
            scores[" (MI)"] = (_in_all(information), _in_all(other))
        values |= _detection(scores)
        pairs = list(resampled(rows)), list(resampled(outside))
        for draw, i, j in zip(draws, *pairs, strict=True):
            draw |= _detection({kind: (a[i], b[j]) for kind, (a, b) in scores.items()})
    single = _of_single_examples(values, rows, outside)
    errors = {
        m: torch.nan if m in single else _spread(torch.tensor([draw[m] for draw in draws]))
        for m in values
    }
    return values, errors


def _of_single_examples(values: Mapping[str, float], rows: Rows, outside: Rows | None) -> set[str]:
    """Return the metrics that come from one example or text alone, all of whose resamples agree."""
    y, found = rows["labels"], set()
    detection = {metric for metric in values if metric.startswith(DETECTION)}
    known = rows if y.ndim == 1 else {"p": rows["p"][(y != MISSING).any(1)]}
    if count_drawn(known) < 2:
        found |= values.keys() - detection
    if outside is not None and min(count_drawn(rows), count_drawn(outside)) < 2:
        found |= detection
    if ANSWERED in rows and int(rows[ANSWERED].sum()) == 1:
        found.add(ERROR_RATE)
    return found


def _of_rows(rows: Rows, index: Tensor) -> dict[str, float]:
    p, y = rows["p"][index], rows["labels"][index]
    metrics = METRICS if y.ndim == 1 else LABEL_METRICS
    values = {metric: function(p, y) for metric, function in metrics.items()}
    if SETS in rows:
        values |= set_metrics(rows[SETS][index], y)
    if ANSWERED in rows:
        values |= answering_metrics(rows[ANSWERED][index], p, y)
    return values


def _in_all(information: Tensor) -> Tensor:
    """Return one number per example, of independent labels the sum."""
    return information if information.ndim == 1 else information.sum(1)


def _spread(values: Tensor) -> float:
    """Return the standard deviation of resamples; some may have no answers, or no known label."""
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else torch.nan


def _detection(scores: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    auroc = {f"{DETECTION} AUROC{kind}": ood_auroc(*pair) for kind, pair in scores.items()}
    return auroc | {f"{DETECTION} FPR95{kind}": ood_fpr95(*pair) for kind, pair in scores.items()}
