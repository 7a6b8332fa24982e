"""Read a file beside the data, in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from laplace_lora.commands.base import note
from laplace_lora.commands.reading.columns import Columns, listed, present_in
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.names import read_as_numbered
from laplace_lora.commands.reading.rows import Row
from laplace_lora.commands.reading.said import cuts_said


def loader_beside(
    inputs: Inputs,
    rows: Sequence[Row],
    named: Mapping[str, Sequence[str]],
    options: Mapping[str, Any],
    source: str,
) -> DataLoader[Any]:
    """Return batches with labels, and say how many texts are cut.

    Raises:
        ValueError: If reading raises it, see `Inputs.loader`, `read_as_numbered` and `read_beside`.
    """
    plan = read_as_numbered(inputs.plan, named, options, source)
    with read_beside(rows, plan.columns, source):
        loader = Inputs(inputs.adapter, plan).loader(rows, options["batch_size"])
    note(cuts_said(inputs, loader.dataset, rows, source))
    return loader


@contextmanager
def read_beside(rows: Sequence[Row], columns: Columns, source: str) -> Iterator[None]:
    """Name the file in errors of reading it, and refuse one without second texts.

    A row may lack a second text; if none has one, they are under another name.

    Raises:
        ValueError: If second texts are missing, or reading raises it.
    """
    try:
        if columns.pair is not None and columns.pair not in present_in(rows):
            raise ValueError(
                f"there is no column {columns.pair!r} with second texts, which the data have; this "
                f"file has {listed(present_in(rows))}"
            )
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
