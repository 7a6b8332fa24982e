"""Risk control: from which confidence on to answer, so that few enough of the answers are wrong.

The threshold is tested, not read off: for each candidate the hypothesis that more of the answers
are wrong than accepted is rejected by an exact binomial test, or the candidate is left. Given the
confidence that comes next, the examples above it are independent draws of those that a threshold
there would answer, so the test holds whatever the predictive. Candidates are tested one after the
other, from the fifth of the examples with the most confidence on, until a test fails: so each has
the whole error to spend. Source: Angelopoulos, Bates, Candès, Jordan, Lei (2021), *Learn then
test*, arXiv:2110.01052; for answers and binomial bounds Geifman and El-Yaniv (2017),
arXiv:1705.08500.
"""

from __future__ import annotations

import math

import torch
from scipy.special import bdtr
from torch import Tensor

from laplace_lora.display.warning import warn

ANSWERED = "answered"
ERROR_RATE = "error when answered"
FIRST = 0.2  # share of the examples that the first candidate answers
ROUNDING = 1e-9
NEVER = 1.0  # no confidence is above it


def answering_threshold(
    probs: Tensor, labels: Tensor, risk: float, certainty: float = 0.9
) -> float:
    """Return the lowest confidence above which at most so many of the answers are wrong.

    Args:
        probs: Class probabilities of labelled examples on which nothing was trained or tuned,
            ``(examples, classes)``.
        labels: Their labels, ``(examples,)``.
        risk: Accepted share of wrong answers.
        certainty: Probability, over the draw of these examples, with which it holds for others.

    Returns:
        The threshold: answer where the largest probability is above it. 1 if none can be shown to
        do.

    Raises:
        ValueError: If risk or certainty is not between 0 and 1, or there are so few labels that
            even without a single error nothing could be shown.

    Warns:
        UserWarning: If no threshold can be shown to do.
    """
    check_share("risk", risk)
    check_share("certainty", certainty)
    level = 1 - certainty
    needed = math.ceil(math.log(level) / math.log1p(-risk) - ROUNDING)
    n = len(labels)
    if n < needed:
        raise ValueError(
            f"a risk of {risk} with certainty {certainty} needs {needed} labelled examples or more "
            f"to be shown, got {n}; accept a higher risk, or be less certain"
        )
    confidence, order = probs.double().amax(1).sort(descending=True)
    is_wrong = probs.argmax(1)[order] != labels[order]
    wrong = torch.cat([torch.zeros(1), is_wrong.cumsum(0)]).tolist()
    # The k-th is passed by k examples, or by fewer where the next ones are as confident.
    thresholds: list[float] = [*confidence.tolist(), 0.0]
    above = torch.searchsorted(-confidence, -confidence.new_tensor(thresholds)).tolist()
    found, first = NEVER, max(math.ceil(FIRST * n), needed)
    for k in range(first, n + 1):
        if above[k] < first:
            continue
        if bdtr(wrong[above[k]], above[k], risk) > level * (1 + ROUNDING):
            break
        found = thresholds[k]
    if found == NEVER:
        warn(
            f"no threshold keeps the share of wrong answers at or below {risk} as far as {n} "
            f"labels can show with certainty {certainty}, so nothing is answered",
        )
    return found


def check_share(name: str, value: float) -> None:
    """Refuse a number that is not between 0 and 1.

    Raises:
        ValueError: If it is not.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def answering_metrics(answered: Tensor, probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the share of examples that are answered, and the share of these that is wrong.

    Args:
        answered: Which examples are answered, ``(examples,)``.
        probs: Class probabilities, ``(examples, classes)``.
        labels: Labels, ``(examples,)``.
    """
    is_wrong = (probs.argmax(1) != labels)[answered]
    return {
        ANSWERED: float(answered.double().mean()),
        ERROR_RATE: float(is_wrong.double().mean()),  # not a number if none is
    }
