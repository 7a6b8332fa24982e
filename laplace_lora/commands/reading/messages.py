"""Tell lists of messages from texts, refuse what would be misread, and apply the chat template."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

ASSISTANT = "assistant"  # the role whose messages are answers
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


def check_contents(messages: Sequence[dict[str, Any]], number: int, name: str | None) -> None:
    """Refuse messages without a content, which a template would write as nothing or as "None".

    Args:
        messages: Of a row.
        number: The row's, from 1.
        name: The column's name.

    Raises:
        ValueError: If a content is neither a text nor a list of parts, and no call of a tool
            stands for it.
    """
    for place, message in enumerate(messages, start=1):
        content = message.get("content")
        is_there = isinstance(content, str) or (isinstance(content, list | tuple) and content)
        if not is_there and (content is not None or not message.get("tool_calls")):
            written = json.dumps(content, default=str)[:60] if "content" in message else "nothing"
            raise ValueError(
                f"row {number}: message {place} in its column {name!r} has {written} as its "
                "content; expected a text, which may be empty"
            )


def check_asks(messages: Sequence[dict[str, Any]], number: int, name: str | None) -> None:
    """Refuse a prompt that holds its answer: messages the last of which is the assistant's.

    Args:
        messages: Of a row.
        number: The row's, from 1.
        name: The column's name.

    Raises:
        ValueError: If the last message is the assistant's.
    """
    if messages[-1]["role"] == ASSISTANT:
        raise ValueError(
            f"row {number}: the last message in its column {name!r} is the assistant's, so that "
            "the model would read an answer before it is asked for one. Leave that message out; "
            "if the model is to go on with it, give a text that ends there, and say --no-chat"
        )


def check_says(answer: Sequence[dict[str, Any]], number: int) -> None:
    """Refuse an answer to be scored in which the assistant says nothing.

    Args:
        answer: The messages behind a prompt.
        number: The row's, from 1.

    Raises:
        ValueError: If a message of the assistant's is empty.
    """
    for message in answer:
        is_empty = message.get("content") == "" and not message.get("tool_calls")
        if message["role"] == ASSISTANT and is_empty:
            raise ValueError(f"row {number}: the assistant's answer is empty; leave the row out")


def templated(messages: list[dict[str, Any]], tokenizer: Any, asks: bool) -> dict[str, Any]:
    """Return the tokens of messages through the chat template.

    Args:
        messages: With contents.
        tokenizer: With the template.
        asks: Whether the template is to end where the assistant answers.

    Raises:
        TemplateError: If the template does not take them, or writes a content of several parts as
            Python writes a list.
        ValueError: If there is no template.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the data are messages, but the tokenizer has no chat template")
    options = {"add_generation_prompt": asks, "tokenize": True, "return_dict": True}
    parts = [str(m["content"]) for m in messages if isinstance(m.get("content"), list)]
    if parts:
        text = tokenizer.apply_chat_template(messages, **{**options, "tokenize": False})
        if any(part in text for part in parts):
            raise TemplateError("it writes a content of several parts as it stands; give a text")
    return dict(tokenizer.apply_chat_template(messages, **options))


@contextmanager
def template_takes(number: int) -> Iterator[None]:
    """Name the row in what a chat template says of messages that it does not take.

    Args:
        number: The row's, from 1.

    Raises:
        ValueError: If the template raises an error.
    """
    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"row {number}: the chat template does not take these messages ({error}). Write them "
            "as those of the training were, a system's message at the beginning of the user's "
            "first one, say; or give texts with all that the training had, and say --no-chat"
        ) from error
