"""What `predict` may be given: texts in any container, rows of a data set, batches, loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from laplace_lora.models.inputs.batch_checks import check_adapter
from laplace_lora.predictive.texts import check_pads, is_text_pair
from laplace_lora.structures.settings import check_count

# From a padded batch, the rows that are in it and how many tokens of padding stand before each, to
# the batch with what else the rows say of their tokens.
Placed = Callable[[Any, Sequence[Mapping[str, Any]], Tensor], Any]

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
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    batch_size: int,
    apart: str = "",
    placed: Placed | None = None,
) -> tuple[Tensor, list[Any]]:
    """Return the order in which rows of similar length stand together, and their batches.

    Args:
        rows: Examples as a data set yields them, one by one.
        tokenizer: Pads rows of different lengths; ``None`` if all have one length.
        batch_size: Rows per batch.
        apart: What of the rows the tokenizer does not pad.
        placed: Puts it into their batch, see `Placed`.

    Raises:
        ValueError: If rows of different lengths have no tokenizer that can pad, one is empty,
            ``batch_size`` is no positive number, or see `check_adapter`.
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
    check_count("batch_size", batch_size)
    for row in rows:
        check_adapter(row)
    is_left = getattr(tokenizer, "padding_side", "right") == "left"

    def collated(which: Tensor) -> Any:
        whole = [rows[i] for i in which.tolist()]
        # Datasets keep texts beside the numbers made of them.
        part = [{k: v for k, v in row.items() if k != apart and not _is_text(v)} for row in whole]
        if tokenizer is None:
            batch = default_collate([{k: torch.as_tensor(v) for k, v in r.items()} for r in part])
        else:
            batch = tokenizer.pad(part, return_tensors="pt")
        if placed is None:
            return batch
        before = batch["input_ids"].shape[1] - lengths[which]
        return placed(batch, whole, before if is_left else torch.zeros_like(before))

    order = lengths.argsort(stable=True)
    return order, list(map(collated, order.split(batch_size)))


def in_places(values: Sequence[Any], before: Tensor, width: int, fill: int) -> Tensor:
    """Return values of the tokens of some rows where these stand in their batch.

    Args:
        values: Integers for each row.
        before: Tokens of padding before each.
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
