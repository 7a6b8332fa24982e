"""Columns of results as a table, HTML or rich's, as a pandas data frame, and as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import isnan
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import RenderableType

SHOWN_ROWS = 10
LONG, ENDLESS = 1e4, 1e9  # numbers between are shown in full, without a power of ten


def plain(value: Any) -> Any:
    """Return tensors as numbers and nested lists, throughout mappings and sequences.

    What comes out can be written as JSON if the other values can.
    """
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def short(value: Any) -> str:
    """Return a value as people read it: numbers with four significant digits."""
    if isinstance(value, list):
        return ", ".join(map(short, value))
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if LONG <= abs(value) < ENDLESS else f"{value:.4g}"


def with_error(value: float, error: float) -> str:
    """Return a figure with its standard error; without one where none is known.

    Args:
        value: The figure.
        error: Not a number if there is no standard error, as that of a single example.
    """
    return f"{value:.3f}" if isnan(error) else f"{value:.3f} ± {error:.3f}"


def in_markdown(value: object) -> str:
    """Return a value that stays in its cell: a bar would end it, a new line the row."""
    return " ".join(str(value).split()).replace("|", "\\|")


def span(values: Tensor, digits: int) -> str:
    """Return the least and the greatest of some numbers, or the one that they all are.

    Args:
        values: At least one.
        digits: Significant ones.
    """
    low, high = float(values.detach().min()), float(values.detach().max())
    return f"{low:.{digits}g}" if low == high else f"{low:.{digits}g}..{high:.{digits}g}"


def html_table(
    columns: Mapping[str, Sequence[Any]], title: str = "", limit: int | None = None
) -> str:
    """Return an HTML table.

    Args:
        columns: Values by heading, as many in each.
        title: Caption; the number of rows left out is added to it.
        limit: Rows to show at most; ``None`` shows all.
    """
    rows = list(zip(*columns.values(), strict=True))
    title = titled(title, len(rows), limit)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(_row(row) for row in rows[:limit])
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def terminal_table(
    columns: Mapping[str, Sequence[Any]], title: str, limit: int | None = None
) -> RenderableType:
    """Return a table for `rich.print`.

    Args:
        columns: Values by heading, as many in each; numbers stand on the right.
        title: Stands above; the number of rows left out is added to it.
        limit: Rows to show at most; ``None`` shows all.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = list(zip(*columns.values(), strict=True))
    table = Table()
    for name, values in columns.items():
        numeric = all(isinstance(value, int | float) for value in values)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(Text(short(value)) for value in row))
    return Group(Text(titled(title, len(rows), limit), style="italic"), table)


def titled(title: str, count: int, limit: int | None) -> str:
    """Return a table's title, with how many of its rows are shown if not all are."""
    if limit is None or count <= limit:
        return title
    return f"{title} (the first {limit} of {count})"


def _row(values: Iterable[Any]) -> str:
    return f"<tr>{''.join(f'<td>{escape(short(value))}</td>' for value in values)}</tr>"


def data_frame(
    columns: Mapping[str, Sequence[Any]], index: Sequence[Any] | None = None
) -> DataFrame:
    """Return columns as a data frame.

    Args:
        columns: Values by heading, as many in each.
        index: Names of the rows.

    Raises:
        ImportError: If pandas is missing.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas() requires pandas: `pip install pandas`") from error
    return pandas.DataFrame(dict(columns), index=index)


def spread(name: str, values: Tensor) -> dict[str, list[Any]]:
    """Return a matrix as one column for each of its own: ``name_0``, ``name_1`` and so on.

    Args:
        name: Of the columns.
        values: Shape ``(rows, columns)``.
    """
    return {f"{name}_{i}": plain(column) for i, column in enumerate(values.unbind(1))}
