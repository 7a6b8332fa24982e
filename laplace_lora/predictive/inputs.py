"""What `predict` may be given: texts in any container, rows of a data set, batches, loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from laplace_lora.models.inputs.batch_checks import check_adapter
from laplace_lora.predictive.texts import check_pads, is_text_pair
from laplace_lora.structures.settings import check_count

# Dimensions of one example's tensor.
ROW_DIMS = {"input_ids": 1, "pixel_values": 3, "input_features": 2, "input_values": 1}


def kind_of(data: Any) -> tuple[str, Any]:
    """Return what data are, and the data as a list or as an iterable of batches.

    A bare string is one text. An iterator is read to its end where it yields texts or rows.

    Args:
        data: Texts or pairs of texts, rows of a data set, or batches.

    Returns:
        ``"texts"``, ``"rows"`` or ``"batches"``, and the data.

    Raises:
        TypeError: If the data are none of these, or a table.
    """
    if isinstance(data, str):
        return "texts", [data]
    if hasattr(data, "columns") and (hasattr(data, "to_numpy") or hasattr(data, "to_pydict")):
        raise TypeError(
            f"predict takes no table: a {type(data).__name__} is iterated by its columns. Give the "
            "one with the texts: predict(table['text'], tokenizer)"
        )
    if _is_labelled_batch(data):
        return "batches", [data]
    if not isinstance(data, Iterable):
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise TypeError(f"predict takes a loader, a batch or texts, got {type(data).__name__}")
        data = [data[i] for i in range(len(data))]  # a data set that is only indexed
    if hasattr(data, "tolist"):
        data = data.tolist()  # numpy's and pandas' texts
    if hasattr(data, "dataset"):
        return "batches", data  # a loader, which must be iterated over once only
    whole = data if isinstance(data, Sequence) else None
    items = iter(data)
    start = list(islice(items, 1))
    kind = _kind(start[0]) if start else "batches"
    if start and not isinstance(start[0], Mapping | Tensor | list | tuple | str):
        if whole is not None and any(isinstance(item, str) or is_text_pair(item) for item in whole):
            return "texts", whole  # of which the first is missing
        raise TypeError(
            "predict takes texts, rows with 'input_ids' or batches of tensors, got "
            f"{type(data).__name__} of {type(start[0]).__name__}"
        )
    if kind == "batches":
        return kind, chain(start, items) if whole is None else whole
    return kind, whole if whole is not None else [*start, *items]


def batches_of_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, batch_size: int
) -> tuple[Tensor, list[Any]]:
    """Return the order in which rows of similar length stand together, and their batches.

    Args:
        rows: Examples as a data set yields them, one by one.
        tokenizer: Pads rows of different lengths; ``None`` if all have one length.
        batch_size: Rows per batch.

    Raises:
        ValueError: If rows of different lengths have no tokenizer that can pad, one is empty, or
            see `check_adapter` and `rows_of_batches`.
    """
    lengths = torch.tensor([len(row.get("input_ids", (0,))) for row in rows])
    if bool((lengths == 0).any()):
        raise ValueError(
            f"rows {(lengths == 0).nonzero().flatten().tolist()} have no tokens; leave them out"
        )
    if tokenizer is None and int(lengths.min()) != int(lengths.max()):
        raise ValueError("rows of different lengths need `tokenizer`, which pads them")
    if tokenizer is not None:
        check_pads(tokenizer)
    order = lengths.argsort(stable=True)

    for row in rows:
        check_adapter(row)
    # Datasets keep texts beside the numbers made of them.
    rows = [{k: v for k, v in row.items() if not _is_text(v)} for row in rows]

    def collated(part: list[Mapping[str, Any]]) -> Any:
        if tokenizer is None:
            tensors = [{k: torch.as_tensor(v) for k, v in row.items()} for row in part]
            return default_collate(tensors)
        return tokenizer.pad(part, return_tensors="pt")

    return order, list(map(collated, rows_of_batches(rows, order, batch_size)))


def rows_of_batches(
    rows: Sequence[Mapping[str, Any]], order: Tensor, batch_size: int
) -> list[list[Mapping[str, Any]]]:
    """Return which rows stand together in each of the batches that `batches_of_rows` makes.

    Raises:
        ValueError: If ``batch_size`` is no positive number.
    """
    check_count("batch_size", batch_size)
    return [[rows[i] for i in part.tolist()] for part in order.split(batch_size)]


def padding_before(
    rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor], tokenizer: Any
) -> Tensor:
    """Return how many tokens of padding stand before each row in its batch, ``(rows,)``.

    Args:
        rows: As they were given, with ``input_ids``.
        batch: What they were padded to, see `batches_of_rows`.
        tokenizer: What padded them, ``None`` if nothing did.
    """
    added = batch["input_ids"].shape[1] - torch.tensor([len(row["input_ids"]) for row in rows])
    is_left = getattr(tokenizer, "padding_side", "right") == "left"
    return added if is_left else torch.zeros_like(added)


def in_places(values: Sequence[Any], before: Tensor, width: int, fill: int) -> Tensor:
    """Return values of the tokens of some rows where these stand in their batch.

    Args:
        values: Integers for each row.
        before: See `padding_before`.
        width: Tokens of the batch.
        fill: At padding.

    Returns:
        Shape ``(rows, width)``.
    """
    placed = torch.full((len(values), width), fill)
    for row, own, first in zip(placed, values, before.tolist(), strict=True):
        row[first : first + len(own)] = torch.as_tensor(own)
    return placed


def _is_text(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, str)


def _kind(item: Any) -> str:
    if isinstance(item, str) or is_text_pair(item):
        return "texts"
    if isinstance(item, Mapping):
        for name, dims in ROW_DIMS.items():
            if name in item:
                return "rows" if torch.as_tensor(item[name]).ndim == dims else "batches"
    return "batches"


def _is_labelled_batch(data: Any) -> bool:
    """Return whether data are inputs and labels of one batch, and not two batches."""
    if not isinstance(data, tuple | list) or len(data) != 2 or not isinstance(data[1], Tensor):
        return False
    x, y = data
    return isinstance(x, Mapping) or (isinstance(x, Tensor) and x.ndim > y.ndim)
