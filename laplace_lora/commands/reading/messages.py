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
TOOLS = ("tool", "ipython", "function", "observation")  # whose contents templates may write as JSON
ASKING = ("user", "human", "system", "developer", *TOOLS)  # others are names of models
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
    """Refuse messages without a content, and those with pictures or other parts than texts.

    A template would write nothing or "None" for them. What a tool has found may be of any form.

    Args:
        messages: Of a row.
        number: The row's, from 1.
        name: The column's name.

    Raises:
        ValueError: If a content is neither a text nor a list of texts as parts, and no call of a
            tool stands for it.
    """
    for place, message in enumerate(messages, start=1):
        content = message.get("content")
        if _has_role(message, TOOLS) and content is not None:
            continue
        is_there = isinstance(content, str) or (isinstance(content, list | tuple) and content)
        if not is_there and (content is not None or not _says_otherwise(message)):
            written = json.dumps(content, default=str)[:60] if "content" in message else "nothing"
            raise ValueError(
                f"row {number}: message {place} in its column {name!r} has {written} as its "
                "content; expected a text, which may be empty"
            )
        for part in content if isinstance(content, list | tuple) else ():
            kind = (part.get("type") if isinstance(part, dict) else None) or TEXT
            if kind != TEXT:
                raise ValueError(
                    f"row {number}: message {place} in its column {name!r} has a part of the type "
                    f"{kind!r}; only parts of the type {TEXT!r} are read"
                )


def _has_role(message: dict[str, Any], roles: Sequence[str]) -> bool:
    return str(message["role"]).lower() in roles


def _says_otherwise(message: dict[str, Any]) -> bool:
    """Return whether something stands for a message's content, the call of a tool, say."""
    return any(message.get(name) for name in INSTEAD)


def check_asks(messages: Sequence[dict[str, Any]], number: int, name: str | None) -> None:
    """Refuse a prompt that holds its answer: messages the last of which is of nobody who asks.

    Args:
        messages: Of a row.
        number: The row's, from 1.
        name: The column's name.

    Raises:
        ValueError: If the last message is the assistant's, whatever it is called.
    """
    if not _has_role(messages[-1], ASKING):
        raise ValueError(
            f"row {number}: the last message in its column {name!r} is the "
            f"{messages[-1]['role']}'s, so that the model would read an answer before it is asked "
            f"for one. Leave that message out (those of {', '.join(ASKING)} may be the last); if "
            "the model is to go on with it, give a text that ends there, and say --no-chat"
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
        is_empty = message.get("content") == "" and not _says_otherwise(message)
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
    parts = [str(m["content"]) for m in messages if _has_parts(m)]
    try:
        if parts:
            text = tokenizer.apply_chat_template(messages, **{**options, "tokenize": False})
            if any(part in text for part in parts):
                raise TemplateError(
                    "it writes a content of several parts as it stands; give a text"
                )
        return dict(tokenizer.apply_chat_template(messages, **options))
    except TypeError as error:  # of templates that join texts and what is none
        raise TemplateError(str(error)) from error


def _has_parts(message: dict[str, Any]) -> bool:
    """Return whether a message's content are parts, which are not what a tool has found."""
    content = message.get("content")
    if not isinstance(content, list):
        return False
    is_typed = all(isinstance(part, dict) and "type" in part for part in content)
    return (is_typed and len(content) > 0) or not _has_role(message, TOOLS)


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
