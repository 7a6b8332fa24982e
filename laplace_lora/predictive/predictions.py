"""`Predictions`: what a posterior says of some examples, and how people read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from laplace_lora.display.plots import interval_figure, uncertainty_figure
from laplace_lora.display.results import Columns, Result, known_fields
from laplace_lora.display.tables import SHOWN_ROWS, plain, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_CLASSES = 2  # whose probabilities are all shown


@dataclass(frozen=True, repr=False)
class Predictions(Result):
    """The posterior predictive of some examples.

    Attributes:
        mean: Mean logits, regression means or rewards, ``(examples, outputs)``; for preference
            pairs the mean difference of their rewards, ``(examples, 1)``.
        covariance: Their covariance, ``(examples, outputs, outputs)``; without observation noise.
        probs: Class probabilities ``(examples, classes)``, ``None`` for regressions and single
            rewards; of independent labels that each applies, ``(examples, labels)``.
        entropy: Entropy of the averaged softmax in nats, ``(examples,)``: total uncertainty. Of
            independent labels that of each, ``(examples, labels)``, and so are the other two. By
            1024 points, which for ten classes or more and wide posteriors is right to 0.05.
        mutual_information: Its epistemic part, which more training data would remove.
        labels: Labels or targets, where all batches have them.
    """

    mean: Tensor
    covariance: Tensor
    probs: Tensor | None = None
    entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    labels: Tensor | None = None

    @property
    def aleatoric(self) -> Tensor | None:
        """The entropy's other part in nats: the mean entropy of the softmax under the posterior."""
        if self.entropy is None or self.mutual_information is None:
            return None
        return self.entropy - self.mutual_information

    @property
    def std(self) -> Tensor:
        """Standard deviation of each logit or regression mean, ``(examples, outputs)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.mean)

    def __getitem__(self, index: Any) -> Predictions:
        """Return the predictions of some examples: a slice, a mask or indices."""
        return Predictions(**{k: v[index] for k, v in known_fields(self).items()})

    @property
    def has_independent_labels(self) -> bool:
        """Whether each output stands for a label of its own, which applies or does not."""
        return self.entropy is not None and self.entropy.ndim == 2

    @property
    def prediction(self) -> Tensor | None:
        """The most probable class, ``(examples,)``; of each label 1 if it rather applies than not.

        ``None`` where there are no probabilities.
        """
        if self.probs is None:
            return None
        return (self.probs > 0.5).long() if self.has_independent_labels else self.probs.argmax(1)

    def __repr__(self) -> str:
        """Return one line: how many examples, and means of the uncertainties."""
        kind = "labels" if self.has_independent_labels else "outputs"
        text = f"Predictions of {len(self)} examples, {self.mean.shape[1]} {kind}"
        if self.entropy is None or self.mutual_information is None or not len(self):
            return f"{text}: mean standard deviation {self.std.mean():.4g}"
        return (
            f"{text}: mean entropy {self.entropy.mean():.4g} nats, of which "
            f"{self.mutual_information.mean():.4g} epistemic"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as lists by name, one entry per example; what is ``None`` is absent."""
        values = known_fields(self)
        values |= {name: getattr(self, name) for name in ("std", "aleatoric", "prediction")}
        return {name: plain(value) for name, value in values.items() if value is not None}

    def plot(self) -> Figure:
        """Draw the uncertainties of all examples: of classifiers both parts, else intervals.

        Raises:
            ImportError: If matplotlib is missing.
        """
        if self.entropy is None or self.mutual_information is None:
            targets = self.labels
            if targets is not None:
                fits = targets.numel() == self.mean.numel()
                targets = targets.reshape(self.mean.shape) if fits else None
            return interval_figure(self.mean, self.std, targets)
        total, epistemic, is_wrong = self.entropy, self.mutual_information, None
        if self.has_independent_labels:
            total, epistemic = total.sum(1), epistemic.sum(1)
        elif self.labels is not None and self.prediction is not None:
            is_wrong = self.prediction != self.labels
        return uncertainty_figure(total, epistemic, is_wrong)

    def _table(self) -> tuple[Columns, str, int]:
        return self._shown(), repr(self), SHOWN_ROWS

    def _shown(self) -> dict[str, list[Any]]:
        """Return the columns that a person looks at, few enough for a line."""
        columns: dict[str, list[Any]] = {"example": list(range(len(self)))}
        if self.probs is None or self.prediction is None:
            return columns | self._columns()
        if self.has_independent_labels:
            if self.labels is not None:
                columns["labels"] = _where(self.labels == 1)
            columns["prediction"] = _where(self.prediction == 1)
        else:
            if self.labels is not None:
                columns["label"] = plain(self.labels)
            columns["prediction"] = plain(self.prediction)
            if self.probs.shape[1] <= FEW_CLASSES:
                columns |= spread("prob", self.probs)
            else:
                columns["confidence"] = plain(self.probs.amax(1))
        for name in ("entropy", "mutual_information"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = plain(values.sum(1) if values.ndim == 2 else values)
        return columns

    def _columns(self) -> dict[str, list[Any]]:
        """Return a column for each number of an example, but for covariances."""
        columns: dict[str, list[Any]] = {}
        if self.labels is not None and (self.labels.ndim == 1 or self.has_independent_labels):
            columns |= _named("label", self.labels)
        if self.probs is not None and self.prediction is not None:
            columns |= _named("prediction", self.prediction) | spread("prob", self.probs)
        for name in ("entropy", "mutual_information"):
            if getattr(self, name) is not None:
                columns |= _named(name, getattr(self, name))
        return columns | spread("mean", self.mean) | spread("std", self.std)


def _where(is_on: Tensor) -> list[list[int]]:
    """Return the columns in which each row is true."""
    return [plain(row.nonzero().flatten()) for row in is_on]


def _named(name: str, values: Tensor) -> dict[str, list[Any]]:
    """Return a column, or one for each label."""
    return {name: plain(values)} if values.ndim == 1 else spread(name, values)
