"""`evaluate`: a report of a predictive on labelled data, with conformal sets and by group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import Batch
from laplace_lora.data.distributed import together
from laplace_lora.data.order import check_order
from laplace_lora.evaluation.conformal import conformal_sets
from laplace_lora.evaluation.report import CalibrationReport
from laplace_lora.evaluation.risk_control import ANSWERED, answering_threshold, check_share
from laplace_lora.evaluation.rows import (
    Predict,
    check_has_classes,
    has_independent_labels,
    label_key_of,
    model_of,
    predicted_rows,
    reads_pairs,
    with_suffixes,
)
from laplace_lora.evaluation.scores import (
    SETS,
    Rows,
    checked_labels,
    predictive_entropy,
    values_and_errors,
)
from laplace_lora.evaluation.token_rows import TEXT


def evaluate(
    predict: Predict,
    loader: Iterable[Batch],
    *,
    name: str = "predictive",
    ood_loader: Iterable[Batch] | None = None,
    conformal_loader: Iterable[Batch] | None = None,
    coverage: float | None = 0.9,
    risk: float | None = None,
    certainty: float = 0.9,
    groups: Sequence[Any] | Tensor | None = None,
    label_key: str | None = None,
    bootstrap: int = 200,
    seed: int = 0,
    progress_bar: bool | None = None,
) -> CalibrationReport:
    """Evaluate a predictive on labelled data, and on out-of-distribution data if given.

    Labels ``(batch, labels)`` that do not exclude each other are scored by `label_metrics`. Of a
    single sigmoid they may be ``(batch,)``.

    Args:
        predict: From a batch to class probabilities ``(batch, classes)``, or to `Predictions`:
            a posterior ``la``, ``la.predict``, a baseline of this package, or any function. With
            labels ``(batch, labels)``, to the probabilities that they apply. Of a token classifier
            ``(batch, tokens, classes)``, zeros at padding: then every labelled token counts, and
            standard errors are by bootstrap over the texts.
        loader: Batches with labels: mappings with ``label_key``, or pairs of inputs and labels. Of
            preference pairs without labels the chosen text wins; a reward model's may have any
            form that `as_pairs` takes.
        name: Name of the method, for tables and plots.
        ood_loader: Batches of out-of-distribution inputs; adds ``"OOD AUROC"`` and ``"OOD FPR95"``
            by predictive entropy, and ``"OOD AUROC (MI)"`` and ``"OOD FPR95 (MI)"`` by mutual
            information where ``predict`` provides it. Labels are ignored, but those of tokens say
            which count, as in ``loader``: all but -100. Tokens of unlabelled texts all count, with
            a warning.
        conformal_loader: Labelled batches on which nothing was trained or tuned. From them every
            example gets a set of classes, see `conformal_sets`; adds ``"coverage"``, the share of
            sets that hold the label, and ``"set size"``, the mean number of classes in one.
        coverage: Share of the sets that are to hold the label; ``None`` makes no sets.
        risk: Accepted share of wrong answers. From ``conformal_loader`` follows the confidence
            above which to answer, ``threshold``, see `answering_threshold`; adds ``"answered"``,
            the share of examples that are, and unless that is none ``"error when answered"``.
        certainty: Probability with which the risk is to hold.
        groups: A label of any kind for each example, in the loader's order; adds a report for
            each group, ``by_group``. Of a token classifier one for each text.
        label_key: Key of the labels; ``None`` for the posterior's ``dict_key_y``, or ``"labels"``.
        bootstrap: Number of resamples behind the standard errors.
        seed: Seed of the resamples.
        progress_bar: Whether to show progress, see `progress`.

    Returns:
        The report; tensors are on the CPU.

    Raises:
        ValueError: If a loader is empty, a batch has no labels, labels lie outside the classes, are
            no integers, or none is known, ``predict`` does not return probabilities, ``bootstrap``
            is below 2, there is not one group for each example, groups are given with a loader that
            draws examples in another order, or conformal sets or a risk are
            asked for with too few labels, of anything but classes, or without ``conformal_loader``.
        ImportError: If conformal sets are asked for, and crepes is missing.
    """
    if bootstrap < 2:
        raise ValueError(f"bootstrap needs two resamples or more, got {bootstrap}")
    for share, value in (("coverage", coverage), ("risk", risk), ("certainty", certainty)):
        if value is not None:
            check_share(share, value)
    if risk is not None and conformal_loader is None:
        raise ValueError("a risk is kept on labelled data of their own: give `conformal_loader`")
    check_has_classes(predict)
    if groups is not None:
        check_order(loader, "the data")
    key = label_key_of(predict) if label_key is None else label_key
    threshold, independent = None, has_independent_labels(predict)
    by_example = partial(with_suffixes, label_key=key) if reads_pairs(predict) else None
    with together(loader, ood_loader, conformal_loader, runs=model_of(predict)) as team:

        def rows_of(
            data: Iterable[Batch], title: str, kind: str, labels: bool | None, outside: bool = False
        ) -> dict[str, Tensor]:
            batches = team.batches(data, title, progress_bar, by_example)
            rows = predicted_rows(team, predict, batches, key, labels, outside)
            if not rows:
                raise ValueError(f"the {kind} is empty")
            return rows

        scored = rows_of(loader, f"Evaluating {name}", "loader", independent)
        outside = None
        if ood_loader is not None:
            place = (f"Evaluating {name}, out of distribution", "out-of-distribution loader")
            outside = rows_of(ood_loader, *place, scored["labels"].ndim == 2, True)
        if conformal_loader is not None:
            place = (f"Calibrating {name}", "loader of conformal sets")
            apart = rows_of(conformal_loader, *place, independent)
            y = _exchangeable_labels(apart)
            if coverage is not None:
                scored[SETS] = conformal_sets(scored["p"], apart["p"], y, coverage)
            if risk is not None:
                threshold = answering_threshold(apart["p"], y, risk, certainty)
                scored[ANSWERED] = scored["p"].double().amax(1) > threshold
    scored["labels"] = checked_labels(scored["p"], scored["labels"])
    report = replace(_report(name, scored, outside, bootstrap, seed), threshold=threshold)
    if groups is None:
        return report
    parts = _by_group(scored, groups)
    each = {g: _report(f"{name}, {g}", part, None, bootstrap, seed) for g, part in parts.items()}
    return replace(report, by_group=each)


def _report(
    name: str, rows: Mapping[str, Tensor], outside: Rows | None, bootstrap: int, seed: int
) -> CalibrationReport:
    p, y = rows["p"], rows["labels"]
    values, errors = values_and_errors(rows, outside, bootstrap, seed)
    away = None if outside is None else predictive_entropy(outside["p"], y)
    uncertainty, information = predictive_entropy(p, y), rows.get("information")
    return CalibrationReport(
        name, p, y, values, errors, uncertainty, information, away, rows.get(SETS)
    )


def _exchangeable_labels(rows: Rows) -> Tensor:
    """Return the labels of rows that stand for new ones."""
    if rows["labels"].ndim == 2 or TEXT in rows:
        raise ValueError(
            "conformal sets and risk control are of one class per example; labels that do not "
            "exclude each other, and tokens, which share a text, have none here"
        )
    return checked_labels(rows["p"], rows["labels"])


def _by_group(rows: Rows, groups: Sequence[Any] | Tensor) -> dict[Any, dict[str, Tensor]]:
    """Return the rows of every group, in the order in which groups first appear."""
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    names = [n.item() if getattr(n, "ndim", None) == 0 else n for n in names]  # tensors, numpy's
    # Missing ones, which equal nothing, are one group.
    names = [nan if isinstance(name, float) and isnan(name) else name for name in names]
    texts = rows.get(TEXT)
    count = len(rows["p"]) if texts is None else int(texts[-1]) + 1
    if len(names) < count or (texts is None and len(names) > count):
        raise ValueError(
            f"`groups` needs a label for each of {count} examples, in the loader's order; got "
            f"{len(names)}"
        )
    numbers = {group: i for i, group in enumerate(dict.fromkeys(names))}
    of = torch.tensor([numbers[name] for name in names])
    of = of if texts is None else of[texts]
    present = {group: of == i for group, i in numbers.items() if bool((of == i).any())}
    return {
        group: {name: column[mask] for name, column in rows.items()}
        for group, mask in present.items()
    }
