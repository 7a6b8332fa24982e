"""A posterior's scores on an evaluation set beside the MAP's, from one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import together
from laplace_lora.evaluation.metrics import ece, nll
from laplace_lora.evaluation.spans import span_metrics
from laplace_lora.evaluation.token_rows import by_token, same_width
from laplace_lora.likelihoods.base import labels_tokens
from laplace_lora.likelihoods.multilabel import pooled
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.posteriors.base import LoraLaplace


def scores_beside_map(
    la: LoraLaplace, loader: Any, link_approx: str, progress_bar: bool | None
) -> dict[str, float]:
    """Return NLL and ECE of a classifier's posterior, and of its MAP.

    Args:
        la: A fitted posterior of a classifier.
        loader: Batches with labels.
        link_approx: Link of the predictive.
        progress_bar: Whether to show progress, see `progress`.

    Returns:
        ``laplace_nll``, ``laplace_ece``, ``map_nll`` and ``map_ece``: nats per example, per label
        of a multi-label model, per labelled token; 15 equal-width bins.
    """
    if la.objective.has_spans:
        spans: Any = la.predict(loader, link_approx=link_approx, progress_bar=progress_bar)
        scores = {"laplace": span_metrics(spans), "map": span_metrics(spans.by_map)}
        return {
            f"{way}_{metric.lower()}": values[metric]
            for way, values in scores.items()
            for metric in ("NLL", "ECE")
        }
    with together(loader, device=la.fitted.device, runs=la.fitted.source) as team:
        batches = team.batches(loader, "Evaluating", progress_bar, la.fitted.by_example)
        parts = [_scored(la, batch, link_approx) for batch in batches]
        names = ("labels", "p", "map")
        columns = {name: [part[i] for part in parts] for i, name in enumerate(names)}
        rows = by_token(team.rows(**same_width(columns, team)))
    metrics: dict[str, float] = {}
    for way, predicted in (("laplace", rows["p"]), ("map", rows["map"])):
        p, y = pooled(predicted, rows["labels"])
        metrics |= {f"{way}_nll": nll(p, y), f"{way}_ece": ece(p, y)}
    return metrics


def _scored(la: LoraLaplace, batch: Any, link_approx: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels, and probabilities under posterior and MAP."""
    if labels_tokens(la.objective):
        tokens: Any = la.predict(batch, link_approx=link_approx)
        return tokens.labels, tokens.probs, tokens.map_probs
    p: Any = la(batch, link_approx=link_approx)
    with torch.no_grad(), evaluation_mode(la.model):
        x, y = la.fitted.split(batch)
        return y, p.detach(), la.objective.readout(x).under(la.model(batch))
