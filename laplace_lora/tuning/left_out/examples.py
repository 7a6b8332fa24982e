"""`TrainingExamples`: as the base model and the trained network see them, from one pass.

An example that shares an input with others, as preference pairs do a text, is left out together
with them, unless inputs come again and again with other labels. Where there are too many classes
its own is told apart from some, see `Rivals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.data.subset import Subset
from laplace_lora.likelihoods.base import Readout, Scoring
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.read_columns import ReadColumns
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.evidence.marginal_likelihood import with_first_precision
from laplace_lora.tuning.left_out.function_rows import base_rows
from laplace_lora.tuning.left_out.linear_model import LinearModel, Mode
from laplace_lora.tuning.left_out.recentring import BYTES, ROWS, columns_of
from laplace_lora.tuning.left_out.rivals import Rivals
from laplace_lora.tuning.left_out.shared_inputs import SharedInputs
from laplace_lora.tuning.same_data import check_same_data
from laplace_lora.tuning.validation.cache import ValidationCache, scoring_of

# Of the examples: where inputs come again and again, with labels of their own, new data will be of
# the same inputs. What is known of others, all copies left out, says nothing about these.
CONTRADICTED = 0.25
EXAMPLES = 1000  # of a larger training set, at random: the work grows with the cube of them
FEWEST = 100
RIVALS = 15  # classes that an example is told apart from, where all would be too many


@dataclass(frozen=True)
class TrainingExamples:
    """What one pass over the training data has found.

    Attributes:
        predictor: Of the posterior, under a scalar prior.
        scoring: How predictions of all classes are scored.
        rivals: Which classes a label is told apart from; ``None`` for all others.
        cache: The trained network's functions, and their covariances under any precision.
        linear: The base model, linearised in its trainable tensors.
        inputs: What the examples are told by.
        companions: See `SharedInputs.companions`.
        shares: How probable the trained network takes the classes that a label is told apart from,
            and its own, to be together, ``(N,)``; ``None`` for all classes.
    """

    predictor: Predictor
    scoring: Scoring
    rivals: Rivals | None
    cache: ValidationCache
    linear: LinearModel
    inputs: SharedInputs
    companions: Mapping[int, Sequence[int]]
    shares: Tensor | None

    @property
    def labels(self) -> Tensor:
        """Labels or targets, ``(N,)`` or ``(N, c)``; among rivals all labels are 0."""
        return self.linear.labels

    @property
    def readout(self) -> Readout:
        """The functions of the outputs that are looked at."""
        return self.scoring.readout if self.rivals is None else self.rivals.readout

    @property
    def n_rivals(self) -> int:
        """How many classes a label is told apart from; 0 for all others."""
        return 0 if self.rivals is None else self.rivals.count

    @property
    def first_precision(self) -> Tensor:
        """The prior precision of `predictor`'s posterior, ``(1,)``."""
        return self.predictor.posterior.settings.prior_precision

    @cached_property
    def nll(self) -> float:
        """The trained network's summed loss on the examples, as the linear model counts it."""
        return self.linear.nll(self.cache.mean.double())

    @cached_property
    def left_out_together(self) -> Mapping[int, Sequence[int]]:
        """The companions, but none where most inputs come with several labels."""
        labels = self.cache.y
        drawn_again = self.inputs.contradicted(labels) > CONTRADICTED * len(labels)
        return {} if drawn_again else self.companions

    @cached_property
    def no_covariance(self) -> Tensor:
        """Zeros in place of the functions' covariances, ``(N, c, c)``."""
        mean = self.cache.mean
        return mean.new_zeros(*mean.shape, mean.shape[-1])

    def own_root(self) -> Tensor:
        """Return roots of what each example's curvature says of its functions, ``(N, k, c)``.

        Of a softmax's curvature that is, whatever the other classes' logits are (the Schur
        complement), the curvature among some classes times the probability of all of these.
        """
        root = self.linear.root(self.cache.mean.double())
        if self.shares is not None:
            root = root * self.shares.sqrt()[:, None, None]
        return root.to(self.cache.mean)

    def without(self, mode: Mode, companions: Mapping[int, Sequence[int]] | None = None) -> Tensor:
        """Return every example's functions in a linear model that has not seen it, ``(N, c)``.

        Args:
            mode: How closely that model fits the others.
            companions: Which examples it has not seen either; `left_out_together` by default.
        """
        others = self.left_out_together if companions is None else companions
        return self.linear.leave_one_out(mode, others)[0].to(self.cache.mean)

    def losses(self, mean: Tensor, covariance: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return every example's NLL in nats, float64, ``(N,)``.

        Args:
            mean: Functions of the examples, ``(N, c)``.
            covariance: Their covariances, ``(N, c, c)``.
            labels: Other labels than the examples' own.
        """
        y = self.labels if labels is None else labels
        return self.scoring.nll(mean, covariance, y).double()


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


def look_at(
    posterior: Posterior, loader: Any, team: Together, progress_bar: bool | None
) -> TrainingExamples:
    """Iterate once over training data: Jacobians at the base model, and at the trained weights.

    Of more than `ROWS` examples times contrasts a random subset is looked at.

    Raises:
        ValueError: If the adapter did not start at the base model, or the data are not those of the
            fit.
    """
    posterior.engine.check_outputs_few()
    scoring = scoring_of(posterior, QUADRATURE, 0)
    n_data = posterior.state.n_data
    count, columns = examples_looked_at(posterior), columns_looked_at(posterior)
    some = columns < columns_of(posterior)
    rivals = Rivals(posterior.state.n_outputs, columns) if some else None
    readout = scoring.readout if rivals is None else rivals.readout
    forms = (posterior.by_example, posterior.divides)
    subset = None if count == n_data else Subset(loader, n_data, count, *forms)
    read, takes_out = ReadColumns(posterior.source.model), posterior.leaves_examples_out
    inputs = SharedInputs(posterior.label_key, read, keep_pairs=takes_out)
    predictor = Predictor(with_first_precision(posterior))
    with base_rows(posterior, readout, BYTES / (4 * count * columns)) as rows:

        def watch(x: Any, y: Tensor) -> None:
            if rivals is not None:
                rivals.draw(y)
            rows.add(x, y)
            inputs.add(x, y)

        groups = torch.zeros(len(posterior.names), dtype=torch.long)
        noting = readout if rivals is None else rivals.noting
        options = (groups, noting, progress_bar, watch, team, "Leaving each example out")
        cache = ValidationCache(predictor, subset or loader, *options)
    labels = cache.y if rivals is None else torch.zeros_like(cache.y)
    linear = rows.linear_model(labels, team)
    companions = inputs.companions(team)
    shares = None if rivals is None else team.rows(shares=rivals.shares)["shares"]
    parts = (predictor, scoring, rivals, cache, linear, inputs, companions, shares)
    examples = TrainingExamples(*parts)
    is_whole = subset is None and rivals is None
    loss = examples.nll / float(posterior.scale.detach()) if is_whole else None
    seen = len(cache.y) if subset is None else subset.seen
    check_same_data(posterior.state, seen, loss, "leave-one-out")
    return examples
