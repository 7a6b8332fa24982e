"""Tell lists of messages from texts, and refuse those that would be misread."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

ASSISTANT = "assistant"  # the role whose messages are answers
USER = "user"
TOOLS = ("tool", "ipython", "function", "observation")  # whose contents templates may write as JSON
USERS = (USER, "human")
GUIDES = ("system", "developer")  # who say how to answer
ASKING = (*USERS, *GUIDES, *TOOLS)  # others are names of models
INSTEAD = ("tool_calls", "function_call", "reasoning_content")  # of a content
COLUMN = "messages"  # holds nothing else
TEXT = "text"  # the type of parts that are read


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages, each with a role."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(message, dict) and "role" in message for message in value)
    )


def are_written_out(text: str, name: str | None) -> bool:
    """Return whether a text is a list of messages that a table has made a text of."""
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


def check_contents(messages: Sequence[dict[str, Any]], number: int, name: str | None) -> None:
    """Refuse messages without a content, and those with pictures or other parts than texts.

    A template would write nothing or "None" for them. What a tool has found may be of any form.

    Raises:
        ValueError: If a content is neither a text nor a list of texts as parts, and no call of a
            tool stands for it.
    """
    for place, message in enumerate(messages, start=1):
        content = message.get("content")
        if has_role(message, TOOLS) and content is not None:
            continue
        is_there = isinstance(content, str) or (isinstance(content, list | tuple) and content)
        if not is_there and (content is not None or not says_otherwise(message)):
            written = json.dumps(content, default=str)[:60] if "content" in message else "nothing"
            raise ValueError(
                f"row {number}: message {place} in its column {name!r} has {written} as its "
                "content; expected a text, which may be empty"
            )
        for part in content if isinstance(content, list | tuple) else ():
            wrong = _wrong_part(part)
            if wrong is not None:
                raise ValueError(
                    f"row {number}: message {place} in its column {name!r} has {wrong}; only parts "
                    f'of the type {TEXT!r} are read, such as {{"type": "text", "text": "..."}}'
                )


def _wrong_part(part: Any) -> str | None:
    """Return what is wrong with a part of a content, which is to be a text; ``None`` if it is."""
    if isinstance(part, str):
        return None
    kind = (part.get("type") if isinstance(part, dict) else None) or TEXT
    if kind != TEXT:
        return f"a part of the type {kind!r}"
    if not isinstance(part, dict) or not isinstance(part.get(TEXT), str):
        return f"a part without a text, {json.dumps(part, default=str)[:60]}"
    return None


def has_role(message: dict[str, Any], roles: Sequence[str]) -> bool:
    """Return whether a message is of one of these roles."""
    return str(message["role"]).lower() in roles


def says_otherwise(message: dict[str, Any]) -> bool:
    """Return whether something stands for a message's content, the call of a tool, say."""
    return any(message.get(name) for name in INSTEAD)


def check_asks(messages: Sequence[dict[str, Any]], number: int, name: str | None) -> None:
    """Refuse a prompt that holds its answer: messages the last of which is of nobody who asks.

    Raises:
        ValueError: If the last message is the assistant's, whatever it is called.
    """
    if not has_role(messages[-1], ASKING):
        raise ValueError(
            f"row {number}: the last message in its column {name!r} is the "
            f"{messages[-1]['role']}'s, so that the model would read an answer before it is asked "
            f"for one. Leave that message out (those of {', '.join(ASKING)} may be the last); if "
            "the model is to go on with it, give a text that ends there, and say --no-chat"
        )


def check_says(answer: Sequence[dict[str, Any]], number: int) -> None:
    """Refuse an answer to be scored in which the assistant says nothing.

    Raises:
        ValueError: If a message of the assistant's is empty.
    """
    for message in answer:
        is_empty = message.get("content") == "" and not says_otherwise(message)
        if message["role"] == ASSISTANT and is_empty:
            raise ValueError(f"row {number}: the assistant's answer is empty; leave the row out")
