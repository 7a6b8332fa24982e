"""How much of the training data leave-one-out looks at: its work grows with the cube of it."""

from __future__ import annotations

from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.left_out.recentring import ROWS, columns_of

EXAMPLES = 1000  # of a larger training set, at random
FEWEST = 100
RIVALS = 15  # classes that an example is told apart from, where all would be too many


def examples_looked_at(posterior: Posterior) -> int:
    """Return how many training examples are looked at: all, or some at random."""
    affordable, n = ROWS // columns_looked_at(posterior), posterior.state.n_data
    return n if n <= affordable else min(EXAMPLES, affordable)


def columns_looked_at(posterior: Posterior) -> int:
    """Return how many functions of an example's outputs are looked at, see `Rivals`."""
    objective, columns = posterior.objective, columns_of(posterior)
    is_softmax = objective.is_classifier and not objective.has_independent_labels
    leaves_enough = ROWS // columns >= min(posterior.state.n_data, FEWEST)
    return columns if leaves_enough or not is_softmax else min(columns, RIVALS)


def is_enough(posterior: Posterior) -> bool:
    """Return whether these are as many as a choice needs."""
    return examples_looked_at(posterior) >= min(posterior.state.n_data, FEWEST)
