"""`LaplaceClassifier`: a posterior as a scikit-learn classifier of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from torch.utils.data import DataLoader

from laplace_lora.display.warning import warn
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.posteriors.copies import unfitted_copy
from laplace_lora.predictive.inputs import batches_of_rows
from laplace_lora.predictive.texts import encoded

Self = TypeVar("Self", bound="LaplaceClassifier")


class LaplaceClassifier(ClassifierMixin, BaseEstimator):
    """A posterior with ``predict_proba``, so that scikit-learn's tools take it.

    Such as ``CalibrationDisplay.from_estimator(LaplaceClassifier(la, tokenizer), texts, labels)``.

    Args:
        posterior: A posterior over a classifier's adapter, fitted, or to be fitted by `fit`.
        tokenizer: The model's.
        labels: The classes' labels in the order of the model's outputs, in a list or an array;
            0, 1, … when ``None``.
        batch_size: Texts per batch.
    """

    def __init__(
        self,
        posterior: LoraLaplace,
        tokenizer: Any,
        labels: Sequence[Any] | None = None,
        batch_size: int = 16,
    ) -> None:
        self.posterior = posterior
        self.tokenizer = tokenizer
        self.labels = labels
        self.batch_size = batch_size

    @property
    def classes_(self) -> NDArray[Any]:
        """The classes' labels in the order of the columns of `predict_proba`, which is sorted.

        scikit-learn's scores take columns to be in that order, whatever an estimator says. Numbers
        after a fit to classes that scikit-learn had numbered, see `fit`.
        """
        names = np.sort(self._names(self.posterior.fitted.state.n_outputs))
        return np.arange(len(names)) if getattr(self, "are_numbered_", False) else names

    def __sklearn_is_fitted__(self) -> bool:
        """Return whether the posterior has been fitted."""
        return self.posterior.state.is_fitted

    def __sklearn_clone__(self: Self) -> Self:
        """Return a classifier that has not been fitted, of the same model: no fit changes that."""
        parameters = self.get_params(deep=False)
        return type(self)(**{**parameters, "posterior": unfitted_copy(self.posterior)})

    def fit(self, X: Sequence[Any], y: ArrayLike) -> LaplaceClassifier:
        """Fit the posterior, not the network, to texts and labels, and tune its prior.

        Args:
            X: Texts, those that the adapter was trained on, or pairs of texts; of a data frame its
                only column, or its two.
            y: Their labels. Or, of all classes, their places in sorted order, as
                ``cross_val_predict`` and stacked classifiers number them for ``predict_proba``.

        Raises:
            ValueError: If a label is none of the classes', there is not one for each text,
                ``labels`` do not name each class once, the posterior is no classifier's, or
                `predict_proba` would not take the texts.

        Warns:
            UserWarning: If labels are numbers of which it is not clear whether scikit-learn gave
                them to the classes.
        """
        self._check_likelihood()
        outputs = self.posterior.logits_model.n_outputs
        if outputs is not None:  # only a batch can tell that of a multiple-choice model
            self._names(outputs)
        given = self._numbered(np.asarray(y))
        texts = _listed(X)
        if len(texts) != len(given):
            raise ValueError(f"{len(texts)} texts do not fit {len(given)} labels")
        model = self.posterior.logits_model
        are_questions = model.target_ids is not None
        encodings = encoded(texts, self.tokenizer, are_questions, model.answers_behind_texts)
        rows = [
            {**row, "labels": label} for row, label in zip(encodings, given.tolist(), strict=True)
        ]
        _, batches = batches_of_rows(rows, self.tokenizer, self.batch_size)
        loader: DataLoader[Any] = DataLoader([dict(batch) for batch in batches], batch_size=None)  # type: ignore[arg-type]
        self.posterior.fit(loader)
        self.posterior.optimize_prior_precision(train_loader=loader)
        return self

    def _numbered(self, given: NDArray[Any]) -> NDArray[Any]:
        """Return the places of labels in the order of the model's outputs, see `fit`."""
        self.are_numbered_ = False
        classes = self._classes()
        if classes is not None:
            places = {label: place for place, label in enumerate(classes)}
            unknown = sorted(set(given.tolist()) - set(places))
            self.are_numbered_ = bool(unknown) and set(given.tolist()) == set(range(len(places)))
            if self.are_numbered_:
                places = {n: places[label] for n, label in enumerate(sorted(places))}
            elif unknown:
                raise ValueError(
                    f"labels {unknown} are none of the classes {classes}; if "
                    "scikit-learn has numbered the classes, every training fold needs all of them"
                )
            elif self._may_be_numbers(given):
                warn(
                    f"labels {sorted(set(given.tolist()))} may be classes, or scikit-learn's "
                    "numbers of classes of which some are missing here; they are taken for "
                    "classes. Names in the place of numbers (labels=['1', ...]) tell them apart"
                )
            return np.asarray([places[label] for label in given.tolist()])
        if given.dtype.kind not in "biuf":
            raise ValueError(
                f"y has labels such as {given.tolist()[0]!r}, and the classes have numbers; name "
                "them with `labels`, in the order of the model's outputs"
            )
        if given.dtype.kind == "f" and (given == np.floor(given)).all():
            return given.astype(np.int64)  # as tables with whole numbers are often read
        return given

    def _may_be_numbers(self, given: NDArray[Any]) -> bool:
        """Return whether labels of the classes may be the classes' places in sorted order."""
        classes, found = set(self._classes() or ()), set(given.tolist())
        numbers = set(range(len(classes)))
        return classes != numbers and found < numbers and found < classes

    def _check_likelihood(self) -> None:
        if self.posterior.objective.name != "classification":
            raise ValueError(
                "a scikit-learn classifier needs a posterior with likelihood='classification', not "
                f"{self.posterior.objective.name!r}"
            )

    def _names(self, outputs: int) -> NDArray[Any]:
        count = max(outputs, 2)
        classes = self._classes()
        if classes is None:
            return np.arange(count)
        if not len(set(classes)) == len(classes) == count:
            raise ValueError(
                f"labels={classes} must name each of the model's {count} classes once, in the "
                "order of its outputs"
            )
        return np.asarray(classes)

    def _classes(self) -> list[Any] | None:
        """Return the classes' labels as a list, of whatever container."""
        return None if self.labels is None else _listed(self.labels)

    def predict_proba(self, X: Sequence[Any]) -> NDArray[np.float64]:
        """Return the posterior predictive's class probabilities, ``(texts, classes)``.

        Args:
            X: Texts, or pairs of texts, as in `fit`.

        Returns:
            One column for each of `classes_`, in their order.

        Raises:
            ValueError: If the posterior is no classifier's, or see `LoraLaplace.predict`.
        """
        self._check_likelihood()
        found = self.posterior.predict(_listed(X), self.tokenizer, batch_size=self.batch_size)
        probs: NDArray[np.float64] = found.probs.double().cpu().numpy()  # type: ignore[union-attr]
        order = self._names(probs.shape[1]).argsort()
        # scikit-learn wants sums of 1 to the digits of the dtype; the model's have fewer.
        whole: NDArray[np.float64] = probs[:, order] / probs.sum(1, keepdims=True)
        return whole

    def predict(self, X: Sequence[Any]) -> NDArray[Any]:
        """Return the label of the most probable class of each text."""
        best: NDArray[Any] = self.classes_[self.predict_proba(X).argmax(1)]
        return best


def _listed(X: Any) -> list[Any]:
    """Return texts of any container, as scikit-learn's tools cut it, as a list."""
    if hasattr(X, "columns"):  # a data frame, which iterates over the names of its columns
        X = X.to_numpy()
    rows = X.tolist() if hasattr(X, "tolist") else list(X)
    return [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
