"""`Result`: what shows itself in notebooks and terminals, and becomes a data frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from laplace_lora.display.tables import data_frame, html_table, terminal_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import RenderableType

Columns = Mapping[str, Sequence[Any]]


class Result:
    """Base of the results that people read; subclasses say what is in their tables."""

    def _repr_html_(self) -> str:
        """Return a small table, as notebooks show it."""
        return html_table(*self._table())

    def __rich__(self) -> RenderableType:
        """Return the same table for a terminal, as `rich.print` shows it."""
        return terminal_table(*self._table())

    def to_dict(self) -> dict[str, Any]:
        """Return everything by name, ready for JSON."""
        raise NotImplementedError

    def to_pandas(self) -> DataFrame:
        """Return a data frame: one row per example, question or token, or a single one.

        Raises:
            ImportError: If pandas is missing.
        """
        return data_frame(self._columns())

    def _table(self) -> tuple[Columns, str, int | None]:
        """Return the columns that a person looks at, their title, and how many rows to show."""
        raise NotImplementedError

    def _columns(self) -> Columns:
        """Return the columns of the data frame."""
        return {name: [value] for name, value in self.to_dict().items()}


def known_fields(instance: Any) -> dict[str, Any]:
    """Return a dataclass's fields by name, without those that are ``None``."""
    values = {field.name: getattr(instance, field.name) for field in fields(instance)}
    return {name: value for name, value in values.items() if value is not None}
