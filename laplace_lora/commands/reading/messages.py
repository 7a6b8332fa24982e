"""Tell lists of messages from texts, and from texts that were made of such lists."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

COLUMN = "messages"  # holds nothing else


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages, each with a role."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(message, dict) and "role" in message for message in value)
    )


def are_written_out(text: str, name: str | None) -> bool:
    """Return whether a text is a list of messages that a table has made a text of.

    Args:
        text: What a row has in a column.
        name: The column's name.
    """
    if name == COLUMN:
        return True
    if re.match(r"\s*\[\s*\{", text) is None:
        return False
    # pandas and `datasets` write arrays of messages as numpy does, without commas between them.
    for read, written in ((json.loads, text), (ast.literal_eval, text.replace("}\n {", "}, {"))):
        try:
            return is_messages(read(written.strip()))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return False
