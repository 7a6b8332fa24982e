"""Conformal prediction sets: sets of classes that hold the label with a chosen probability.

Split conformal prediction with one minus the probability of a class as its score. Where the
examples behind a set and those of the calibration are exchangeable, sets hold the label with at
least that probability, whatever the predictive; a better one has smaller sets. Source: Vovk,
Gammerman, Shafer (2005), *Algorithmic learning in a random world*; Sadinle, Lei, Wasserman (2019),
*Least ambiguous set-valued classifiers with bounded error levels*.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from laplace_lora.evaluation.risk_control import check_share

LABEL_COVERAGE = "coverage"
SET_SIZE = "set size"
ROUNDING = 1e-9  # a class is left out if its p-value, a whole share, is 1 − coverage or less


def conformal_sets(
    probs: Tensor, calibration: Tensor, labels: Tensor, coverage: float = 0.9
) -> Tensor:
    """Return which classes the set of each example holds, ``(examples, classes)``, boolean.

    Args:
        probs: Class probabilities of the examples, ``(examples, classes)``.
        calibration: Those of labelled examples on which nothing was trained or tuned.
        labels: Their labels.
        coverage: Share of the examples whose set is to hold their label.

    Raises:
        ValueError: If the coverage is not between 0 and 1, or there are so few labels that every
            set would hold all classes.
        ImportError: If crepes is missing.
    """
    check_share("coverage", coverage)
    needed = math.ceil(1 / (1 - coverage) - ROUNDING) - 1
    if len(labels) < needed:
        raise ValueError(
            f"conformal sets with coverage {coverage} need {needed} labelled examples or more for "
            f"their calibration, got {len(labels)}"
        )
    try:
        with warnings.catch_warnings():  # crepes changes the filters of the whole process
            from crepes import ConformalClassifier
            from crepes.extras import hinge
    except ImportError as error:
        raise ImportError(
            "conformal prediction sets require crepes: `pip install crepes`"
        ) from error
    classes = torch.arange(probs.shape[1]).numpy()
    classifier = ConformalClassifier()
    own = calibration.double().numpy()
    classifier.fit(hinge(own, classes, labels.numpy()))
    # Without smoothing, which draws random numbers, sets are never too small.
    sets = classifier.predict_set(
        hinge(probs.double().numpy()), confidence=coverage - ROUNDING, smoothing=False
    )
    return torch.from_numpy(sets).bool().reshape(probs.shape)


def set_metrics(sets: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the share of sets that hold the label, and the mean number of classes in a set.

    Args:
        sets: Which classes each set holds, ``(examples, classes)``.
        labels: Labels, ``(examples,)``.
    """
    held = sets.gather(1, labels.unsqueeze(1))
    return {
        LABEL_COVERAGE: float(held.double().mean()),
        SET_SIZE: float(sets.sum(1).double().mean()),
    }
