"""Batches of any form a loader yields: their length, some of their examples, inputs and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

# A mapping as Hugging Face collators make it, a pair of inputs and labels, or a tensor of inputs.
Batch: TypeAlias = Mapping[str, Any] | Sequence[Any] | Tensor
TEXTS = ("input_ids", "input_ids_chosen")


def batch_length(batch: Batch) -> int:
    """Return the number of examples in a batch."""
    if isinstance(batch, Mapping):
        first = [batch.get(key) for key in TEXTS]  # images have rows of their own
        tensors = (v for v in (*first, *batch.values()) if isinstance(v, Tensor))
        return next(len(v) for v in tensors if v.ndim)
    return len(batch) if isinstance(batch, Tensor) else batch_length(batch[-1])


def splits_by_example(batch: Batch, examples: int | None = None) -> bool:
    """Return whether every tensor of a batch has one row per example.

    Images of several sizes in one tensor, with a table of their sizes, do not.

    Args:
        batch: Any batch.
        examples: Number of examples, where it is known.
    """
    if isinstance(batch, Tensor):
        return examples in (None, len(batch))
    if not isinstance(batch, Mapping):
        return all(splits_by_example(part, examples) for part in batch)
    lengths = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    return len(lengths) == 1 and (examples is None or lengths == {examples})


def is_joined(batch: Batch) -> bool:
    """Return whether a batch has its examples joined in one row, as collators without padding do.

    Positions then start anew within the row.
    """
    positions = batch.get("position_ids") if isinstance(batch, Mapping) else None
    if not isinstance(positions, Tensor) or positions.ndim != 2 or len(positions) != 1:
        return False
    return bool((positions[0].diff() < 0).any())


def first_examples(batch: Batch, count: int) -> Batch:
    """Return the first examples of a batch."""
    return _examples(batch, slice(count))


def one_example(batch: Batch, n: int) -> Batch:
    """Return a batch of one example."""
    return _examples(batch, slice(n, n + 1))


def on_cpu(batch: Any) -> Any:
    """Return a batch with its tensors on the CPU."""
    if isinstance(batch, Mapping):
        return {key: on_cpu(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [on_cpu(part) for part in batch]
    return batch.cpu() if isinstance(batch, Tensor) else batch


def doubled(batch: Any) -> Any:
    """Return a batch of one example with the example twice.

    Positions that the choices of all examples share stay as they are.
    """
    if isinstance(batch, Tensor):
        return torch.cat([batch, batch]) if batch.ndim else batch
    if isinstance(batch, Mapping):
        ids, positions = batch.get("input_ids"), batch.get("position_ids")
        is_shared = getattr(positions, "ndim", 0) < getattr(ids, "ndim", 0)
        return {
            key: value if is_shared and key == "position_ids" else doubled(value)
            for key, value in batch.items()
        }
    is_row = isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 1
    return [*batch, *batch] if is_row else batch


def some_examples(batch: Batch, which: Sequence[int]) -> Batch:
    """Return some examples of a batch.

    Raises:
        ValueError: If its tensors do not have one row per example.
    """
    if not splits_by_example(batch):
        raise ValueError("a batch's tensors do not have one row per example each")
    return _examples(batch, list(which))


def model_inputs(batch: Batch) -> Any:
    """Return what the model is called with: a whole mapping or tensor, or a pair's first part."""
    return batch if isinstance(batch, Mapping | Tensor) else batch[0]


def is_inputs_and_labels(batch: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether a batch is a pair of inputs and labels."""
    return isinstance(batch, Sequence) and len(batch) == 2


def has_labels(batch: Any, label_key: str) -> bool:
    """Return whether a batch has labels; ``None`` in their place are none.

    Args:
        batch: A mapping, a pair, or inputs alone.
        label_key: Key of the labels.
    """
    if isinstance(batch, Mapping):
        return batch.get(label_key) is not None
    return is_inputs_and_labels(batch) and batch[1] is not None


def batch_labels(batch: Batch, label_key: str) -> Tensor:
    """Return the labels of a batch.

    Args:
        batch: A mapping with ``label_key``, or a pair of inputs and labels.
        label_key: Key of the labels.

    Raises:
        ValueError: If the batch has no labels.
        TypeError: If they are no numbers.
    """
    if isinstance(batch, Mapping) and label_key in batch:
        return label_tensor(batch[label_key])
    if is_inputs_and_labels(batch):
        return label_tensor(batch[1])
    raise ValueError(f"a batch has no {label_key!r}; name its labels with `label_key`")


def label_tensor(labels: Any) -> Tensor:
    """Return the labels of a batch as a tensor.

    Raises:
        TypeError: If they are no numbers, such as the names of classes.
    """
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"labels must be numbers, one or as many for each example, got {labels!r:.60} "
            f"({error}); give each class its number, as the model's `config.label2id` does"
        ) from None


def is_empty(batch: Batch) -> bool:
    """Return whether a batch has no examples, as the last one of a filtered stream may."""
    if isinstance(batch, Mapping):
        lengths = [len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim]
        return bool(lengths) and not any(lengths)
    if isinstance(batch, Tensor):
        return batch.ndim > 0 and not len(batch)
    return is_inputs_and_labels(batch) and is_empty(batch[0])


def _examples(batch: Batch, which: slice | list[int]) -> Batch:
    if isinstance(batch, Mapping):
        rows: dict[str, Any] = _rows_of(batch, which, batch_length(batch))
        return rows
    if isinstance(batch, Tensor):
        return batch[which]
    return [_examples(part, which) for part in batch]


def _rows_of(value: Any, which: slice | list[int], size: int) -> Any:
    """Return some of the rows of whatever has ``size``, in a mapping of its values."""
    if isinstance(value, Mapping):
        return {key: _rows_of(part, which, size) for key, part in value.items()}
    is_scalar = getattr(value, "ndim", None) == 0
    if is_scalar or not hasattr(value, "__len__") or len(value) != size:
        return value
    if isinstance(which, slice) or isinstance(value, Tensor):
        return value[which]
    return [value[i] for i in which]
