"""What a likelihood answers: labels, loss, output Hessian, and which outputs are predicted.

Each likelihood is an object of this protocol, made by `registry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.roots import (
    anchored_matrix,
    contrast_root,
    for_each_example,
    several_logits,
)

Columns = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Readout:
    """The linear functions of a model's outputs that a prediction is about.

    Attributes:
        columns: From outputs ``(batch, outputs)`` to their coefficients, ``(columns, batch,
            outputs)``; ``None`` for the outputs themselves.
        mean: From outputs to the functions' values, ``(batch, columns)``.
        is_softmax: Whether they are logits of classes.
        relative: Whether these logits are contrasts to a first class, which stands at zero.
        independent: Whether each is the logit of a label of its own, which applies or does not:
            the one contrast of two classes.
        label_first: Whether an example's own label is the first class of its functions.
    """

    columns: Columns | None
    mean: Callable[[Tensor], Tensor]
    is_softmax: bool
    relative: bool = False
    independent: bool = False
    label_first: bool = False

    def of_softmax(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Return the moments of the logits that meet in one softmax, see `Link`.

        Args:
            mean: Mean of the functions, ``(…, columns)``.
            covariance: Their covariance, ``(…, columns, columns)``.

        Returns:
            Mean, covariance, and whether they are contrasts; of independent labels ``(…, columns,
            1)`` and ``(…, columns, 1, 1)``.
        """
        if not self.independent:
            return mean, covariance, self.relative
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        return mean.unsqueeze(-1), variance[..., None, None], True

    def log_softmax(self, values: Tensor) -> Tensor:
        """Return log probabilities under known values of the functions, ``(…, columns)``.

        Returns:
            Shape ``(…, classes)``; of independent labels ``(…, columns, 2)``.
        """
        values = values.unsqueeze(-1) if self.independent else values
        is_relative = self.relative or self.independent
        return F.log_softmax(F.pad(values, (1, 0)) if is_relative else values, dim=-1)

    def shown(self, p: Tensor) -> Tensor:
        """Return probabilities as users see them: of a label alone, that it applies.

        Args:
            p: Shape ``(…, classes)``; of independent labels ``(…, columns, 2)``.
        """
        return p[..., 1] if self.independent else p

    def under(self, outputs: Tensor) -> Tensor:
        """Return the probabilities that a model's own outputs ``(…, outputs)`` stand for."""
        return outputs.sigmoid() if self.independent else outputs.softmax(-1)


OUTPUTS = Readout(None, lambda f: f, is_softmax=False)
CONTRASTS = Readout(
    contrast_root, lambda f: several_logits(f)[:, 1:] - f[:, :1], is_softmax=True, relative=True
)
ANCHORED = Readout(
    lambda f: for_each_example(anchored_matrix(f), f),
    lambda f: f @ anchored_matrix(f).T,
    is_softmax=False,
)


class Scoring(Protocol):
    """How well Gaussian outputs predict labels; leading dimensions of covariances broadcast."""

    @property
    def readout(self) -> Readout:
        """Which functions of a model's outputs mean and covariance are of."""
        ...

    def nll(self, mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
        """Return each example's negative log likelihood in nats, ``(…, batch)``."""
        ...

    def metric_arguments(self, mean: Tensor, covariance: Tensor) -> list[tuple[Tensor, ...]]:
        """Return what laplace-torch feeds its losses, for each covariance of a grid."""
        ...


class Likelihood(Protocol):
    """A likelihood of a model's outputs; what has a value here is the answer of most.

    Attributes:
        name: As users and saved files call it.
        laplace_name: As laplace-torch's constructors take it.
        is_classifier: Whether a prediction may be class probabilities, which can be calibrated.
        has_noise: Whether there is observation noise to tune.
        samples_labels: Whether curvature is by default estimated from sampled labels.
        has_pairs: Whether an example is a preference pair.
        has_independent_labels: Whether each output is the logit of a label of its own.
        predicts_tokens: Whether an example is a text of which every token is predicted.
        rows_are_tokens: Whether a model has a row of outputs for each token of an example that
            counts, instead of one for the example.
        has_spans: Whether the outputs are tokens as start and as end of an answer.
        jacobian_refusal: Why Jacobians of all outputs are refused; ``None`` where they are not.
    """

    name: str
    laplace_name: str
    is_classifier: bool = False
    has_noise: bool = False
    samples_labels: bool = False
    has_pairs: bool = False
    has_independent_labels: bool = False
    predicts_tokens: bool = False
    rows_are_tokens: bool = False
    has_spans: bool = False
    jacobian_refusal: str | None = None

    @property
    def counts_model_outputs(self) -> bool:
        """Whether the number of outputs is the model's own, and the same for every example."""
        return not (self.has_pairs or self.has_spans)

    @property
    def can_be_calibrated(self) -> bool:
        """Whether held-out labels can choose the width, and temperature or noise."""
        return self.is_classifier or self.has_noise

    def check_outputs(self, outputs: int | None) -> None:
        """Refuse a model with a number of outputs that the likelihood cannot have.

        Raises:
            ValueError: If there are too many.
        """
        return

    def check_values(self, f: Tensor) -> None:
        """Refuse outputs ``(batch, outputs)`` that are no parameters of the likelihood.

        Raises:
            ValueError: If they are not.
        """
        return

    def check_problem(self, problem_type: str | None) -> None:
        """Refuse a model that was trained by another likelihood.

        Args:
            problem_type: What the model's configuration says, see `LogitsModel.problem_type`.

        Raises:
            ValueError: If it says another; names the one to use.
        """
        return

    def by_example(self, batch: Any, label_key: str) -> Any:
        """Return a labelled batch in the form in which every row is an example."""
        return batch

    def split(
        self, batch: Any, label_key: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Tensor]:
        """Split a batch into what the model takes and labels on a device."""
        ...

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihood in nats, summed over the batch."""
        ...

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the exact root of the output Hessian, ``(columns, batch, outputs)``."""
        ...

    def sampled_root(self, f: Tensor, num_samples: int, y: Tensor) -> Tensor:
        """Return an unbiased Monte-Carlo root, ``(num_samples, batch, outputs)``.

        Args:
            f: Outputs.
            num_samples: Columns.
            y: Labels, which say no more than where there are any.
        """
        ...

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of the negative log likelihood, ``(1, batch, outputs)``."""
        ...

    def residual_weights(self, root: Tensor, f: Tensor, y: Tensor) -> Tensor | None:
        """Return weights with which the exact root's columns add up to the residual.

        Args:
            root: Columns ``(columns, batch, outputs)`` of the exact root.
            f: Outputs.
            y: Labels.

        Returns:
            Shape ``(columns, batch)``; ``None`` where there is no closed form.
        """
        return None

    def n_columns(self, outputs: int) -> int:
        """Return how many columns the exact root has per example: those of one softmax."""
        return outputs - 1

    def readout(self, x: Any, pairs: bool = False, contrasts: bool = False) -> Readout:
        """Return which functions of the outputs a prediction for some inputs is about.

        Args:
            x: What the model takes.
            pairs: Take the inputs for preference pairs, whatever they look like.
            contrasts: Whether class probabilities are all that is wanted, so that contrasts do.
        """
        ...

    def scoring(self, link: Link, noise: float) -> Scoring:
        """Return how predictions are scored.

        Args:
            link: From Gaussian logits to probabilities.
            noise: Standard deviation of the observation noise.
        """
        ...


def labels_tokens(objective: Likelihood) -> bool:
    """Return whether every token of a text has a label of its own, as in token classification."""
    return objective.rows_are_tokens and not objective.predicts_tokens


def integrated_variables(likelihood: Likelihood, outputs: int) -> int:
    """Return how many Gaussian variables a link integrates over at once: one for a label alone."""
    return 1 if likelihood.has_independent_labels else max(outputs - 1, 1)
