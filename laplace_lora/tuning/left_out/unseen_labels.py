"""Labels that might come and that no training example has.

Where all examples have one label, each is predicted the better without its own, the more certain
the model is: nothing tells how certain is too certain. `N` examples cannot tell a label that never
comes from one that comes once in `N`. So a choice is charged for one more example with each label
that has not been seen, an average one of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.likelihoods.multilabel import MISSING


def unseen_labels(objective: Likelihood, labels: Tensor, classes: int) -> list[Tensor]:
    """Return labels of all examples, alike, for each label that none of them has.

    Args:
        objective: The likelihood; only classifiers have such labels.
        labels: Of the examples, ``(N,)``; of independent ones ``(N, labels)``.
        classes: How many there are, where they exclude each other.
    """
    if objective.has_independent_labels:
        found = []
        for column, known in enumerate(labels.T):
            seen = set(known.tolist()) - {MISSING}
            for value in {0, 1} - seen if seen else ():
                other = torch.full_like(labels, MISSING)
                other[:, column] = value
                found.append(other)
        return found
    if not objective.is_classifier or objective.has_pairs:  # the first of a pair is always chosen
        return []
    return [torch.full_like(labels, value) for value in set(range(classes)) - set(labels.tolist())]


def with_unseen(
    losses: Callable[[Tensor, Tensor], Tensor], labels: Tensor, unseen: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return every example's loss with its share of the charge for unseen labels.

    Args:
        losses: From functions and labels to every example's loss.
        labels: Of the examples.
        unseen: From `unseen_labels`.
    """

    def charged(functions: Tensor) -> Tensor:
        others = [losses(functions, other) / len(labels) for other in unseen]
        return sum(others, losses(functions, labels))

    return charged
