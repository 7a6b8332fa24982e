"""What a predictive says of each example of some data, checked to be probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.data.batches import Batch, batch_labels, has_labels, model_inputs
from laplace_lora.data.distributed import Together
from laplace_lora.data.pairs import as_pairs, is_pair, is_stacked
from laplace_lora.evaluation.token_rows import MARKS, by_token, same_width, token_marks
from laplace_lora.tuning.validation.calibration_error import ROUNDING, are_fractions

OTHERS = (
    "evaluate is for classifiers: of a regression la.predict(loader) gives mean, std and labels; "
    "answers in a text are scored by `evaluation.spans.span_metrics(la.predict(loader))`"
)

# From a batch of any form to probabilities, or to what has them and their `mutual_information`, as
# `Predictions`.
Predict = Callable[[Any], Any]


def _owner(predict: Predict) -> Any:
    """Return the object whose method predicts, whatever arguments it is given, or the function."""
    while isinstance(predict, partial):
        predict = predict.func
    return getattr(predict, "__self__", predict)


def _objective_of(predict: Predict) -> Any:
    """Return the likelihood of the posterior or baseline that predicts, ``None`` of a function."""
    return getattr(_owner(predict), "objective", None)


def model_of(predict: Predict) -> nn.Module | None:
    """Return the model of the posterior or baseline that predicts, ``None`` if it is neither."""
    owner = _owner(predict)
    # A last-layer posterior's `model` is its head, without the transformer that runs.
    model = getattr(owner, "logits_model", getattr(owner, "model", None))
    return model if isinstance(model, nn.Module) else None


def has_independent_labels(predict: Predict) -> bool | None:
    """Return whether the labels of what predicts are independent, ``None`` where it does not say.

    A posterior's or baseline's likelihood says it, a function does not.
    """
    says: bool | None = getattr(_objective_of(predict), "has_independent_labels", None)
    return says


def check_has_classes(predict: Predict) -> None:
    """Refuse a posterior over answers in a text, which would be asked for labels in vain.

    Raises:
        ValueError: If it is one.
    """
    if getattr(_objective_of(predict), "has_spans", False):
        raise ValueError(f"predict must return class probabilities; {OTHERS}")


def label_key_of(predict: Predict) -> str:
    """Return the key of the labels in batches, that of the posterior where one predicts."""
    key: str = getattr(_owner(predict), "dict_key_y", "labels")
    return key


def reads_pairs(predict: Predict) -> bool:
    """Return whether what predicts is a reward model, whose examples are pairs."""
    objective = _objective_of(predict)
    if getattr(objective, "name", None) == "classification":  # a baseline's, of a single reward
        return getattr(model_of(predict), "n_outputs", None) == 1
    return bool(getattr(objective, "has_pairs", False))


def with_suffixes(batch: Batch, label_key: str) -> Batch:
    """Return a reward model's batch with one row per pair, see `as_pairs`.

    Labelled single texts stay as they are: what is predicted of them says why they are refused.
    """
    x = model_inputs(batch)
    is_labelled = not isinstance(batch, Mapping) or has_labels(batch, label_key)
    if is_pair(x) or (is_labelled and not is_stacked(x)):
        return batch
    return as_pairs(batch, label_key)


def predicted_rows(
    team: Together,
    predict: Predict,
    batches: Iterable[Batch],
    label_key: str,
    independent: bool | None,
    outside: bool = False,
) -> dict[str, Tensor]:
    """Return probabilities, labels and mutual information, where there are any, of all examples.

    Args:
        team: The processes that share the data.
        predict: From a batch to probabilities or `Predictions`.
        batches: Of this process.
        label_key: Key of the labels. Labels of two dimensions are independent of each other.
        independent: Whether they are, whatever their dimensions. ``None`` if nothing says so: then
            those of a single column of probabilities are.
        outside: Whether the data are out of distribution: then labels say which tokens count, and
            nothing else.

    Returns:
        ``"p"``, and where there are any ``"labels"`` and ``"information"``, on the CPU; nothing if
        there are no examples. Of token classifiers a row per token, see `by_token`.

    Raises:
        ValueError: If ``predict`` does not return probabilities.
    """
    names = ("p", "labels", MARKS, "information")
    columns: dict[str, list[Tensor | None]] = {name: [] for name in names}
    for batch in batches:
        p, information = _probabilities(predict, batch)
        y = None if outside else _with_columns(_labels(batch, label_key), p, independent)
        marks = token_marks(batch, label_key, p) if outside and p.ndim == 3 else None
        p = _checked(p, y, p.ndim == 2 and bool(independent if y is None else y.ndim == 2))
        row = (p, y, marks, information)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    present = {
        name: [value for value in column if value is not None]
        for name, column in columns.items()
        if all(value is not None for value in column)
    }
    return by_token(team.rows(**same_width(present, team)))


def _probabilities(predict: Predict, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return probabilities, and mutual information where there is any."""
    if isinstance(predict, nn.Module) and hasattr(predict, "config"):
        raise TypeError(
            f"predict is a model ({type(predict).__name__}), whose outputs are no probabilities; "
            "evaluate MAP(model), a posterior, or a function from a batch to probabilities"
        )
    with torch.no_grad():
        prediction = predict(model_inputs(batch))
    p = getattr(prediction, "probs", prediction)
    information = getattr(prediction, "mutual_information", None)
    p = torch.as_tensor(p) if hasattr(p, "__array__") else p  # numpy's
    if not isinstance(p, Tensor) or p.ndim not in (2, 3):
        raise ValueError(
            "predict must return class probabilities, (batch, classes), or of tokens (batch, "
            f"tokens, classes); {OTHERS}"
        )
    p = p.detach().cpu()
    # In float32 confidences above 1 - 3e-8 are all 1, and probabilities below 1e-45 none.
    p = p if p.dtype == torch.float64 else p.float()
    return p, None if information is None else information.detach().cpu()


def _labels(batch: Batch, label_key: str) -> Tensor:
    pairs = as_pairs(batch, label_key) if is_pair(batch) else batch
    return batch_labels(pairs, label_key).cpu()


def _with_columns(y: Tensor, p: Tensor, independent: bool | None) -> Tensor:
    """Return labels, integers as 64-bit ones, and independent ones ``(batch, labels)``."""
    y = y if y.is_floating_point() else y.long()
    if independent is False and y.ndim == 2 and p.ndim == 2:
        raise ValueError(
            f"labels {tuple(y.shape)} do not exclude each other, and the classes of what predicts "
            "do; give a posterior or a baseline with likelihood='multilabel', or labels (batch,)"
        )
    single = p.ndim == 2 and p.shape[1] == 1
    apply_alone = single if independent is None else independent
    return y.unsqueeze(-1) if y.ndim == 1 and apply_alone else y


def _checked(p: Tensor, y: Tensor | None, independent: bool) -> Tensor:
    """Return probabilities without what rounding took beyond 0 and 1; refuse what is none."""
    if bool(p.isnan().any()):
        raise ValueError(
            "predict returned probabilities that are not numbers (NaN); look for what is not "
            "finite in the model's logits, such as an overflow in float16"
        )
    if independent:
        if y is not None and y.shape != p.shape:
            raise ValueError(
                f"labels {tuple(y.shape)} need a probability each, (batch, labels); predict "
                f"returned {tuple(p.shape)}"
            )
        if not are_fractions(p):
            raise ValueError("predict must return probabilities; apply a sigmoid to logits")
        return p.clamp(0, 1)
    if y is not None and y.ndim == p.ndim - 1 and y.shape != p.shape[:-1]:
        raise ValueError(
            f"predict returned probabilities {tuple(p.shape)} for labels {tuple(y.shape)}; give "
            "each label its own"
        )
    if p.shape[-1] < 2:
        raise ValueError(f"predict must return class probabilities, (batch, classes); {OTHERS}")
    sums = p.sum(-1)
    sums = sums[sums != 0] if p.ndim == 3 else sums  # zeros are padding
    if not are_fractions(p) or not torch.allclose(sums, torch.ones_like(sums), atol=ROUNDING):
        raise ValueError(
            "predict must return probabilities that sum to 1; apply a softmax to logits"
        )
    return p.clamp(0, 1)
