"""Results in a terminal: tables and texts that rich prints. It is loaded when one is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from laplace_lora.display.tables import short, titled

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

STRONG = "black on #d65a31"  # as the ground of the most uncertain token in HTML
NO_TEXT = "·"  # so that the colour of a token that completes no character can be seen
GROUNDS = ((0.75, STRONG), (0.5, "black on #e58b6d"), (0.25, "black on #f2c4b5"))


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


def coloured_text(texts: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """Return a line per text, its tokens on grounds that grow stronger with their uncertainty.

    Args:
        texts: With ``tokens`` each, as `TokenPredictions.to_dict` lists them.
        title: Stands above.
    """
    from rich.console import Group
    from rich.text import Text

    values = [token["mutual_information"] for text in texts for token in text["tokens"]]
    largest = max([*values, 1e-12])
    lines = [Text(title, style="italic")]
    for text in texts:
        line = Text()
        for token in text["tokens"]:
            _append(line, token, largest)
        lines.append(line)
    return Group(*lines)


def _append(line: Text, token: Mapping[str, Any], largest: float) -> None:
    share = token["mutual_information"] / largest
    style = next((style for least, style in GROUNDS if share >= least), "")
    if "text" in token:
        line.append(token["text"] or NO_TEXT, style)
    else:
        line.append(str(token["token"]), style).append(" ")
