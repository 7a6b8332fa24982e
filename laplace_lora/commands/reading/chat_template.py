"""Apply the chat template, and refuse messages of which it would leave something out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from jinja2 import TemplateError

from laplace_lora.commands.reading.messages import (
    ASSISTANT,
    GUIDES,
    TOOLS,
    USERS,
    has_role,
    says_otherwise,
)

FIRST = 8_210_400_000  # of numbers that no template writes by itself, of one length


def templated(messages: list[dict[str, Any]], tokenizer: Any, asks: bool) -> dict[str, Any]:
    """Return the tokens of messages; if it ``asks``, the template ends where the assistant answers.

    Raises:
        TemplateError: If the template does not take them, writes a content of several parts as
            Python writes a list, or leaves out the last message or question, a part, what a
            tool has found, or what a system or developer says.
        ValueError: If there is no template.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the data are messages, but the tokenizer has no chat template")
    try:
        found = dict(
            tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)
        )
    except TypeError as error:  # of templates that join texts and what is none
        raise TemplateError(str(error)) from error
    _check_written(messages, tokenizer, asks)
    return found


def check_answer_written(
    prompt: Sequence[dict[str, Any]], answer: Sequence[dict[str, Any]], tokenizer: Any
) -> None:
    """Refuse an answer of which only what ends each answer would be scored.

    Raises:
        TemplateError: If the template writes the same where the assistant says nothing.
    """
    silent = [
        {"role": m["role"], "content": ""} if has_role(m, (ASSISTANT,)) else m for m in answer
    ]
    try:
        of_both, of_none = (
            tokenizer.apply_chat_template([*prompt, *messages], tokenize=False)
            for messages in (answer, silent)
        )
    except (TemplateError, TypeError):  # of a template that takes no such answer
        return
    if of_both == of_none:
        raise TemplateError("it writes nothing of the assistant's answer")


def _check_written(messages: Sequence[dict[str, Any]], tokenizer: Any, asks: bool) -> None:
    """Refuse messages if the template writes a list, or nothing of what the answer is to.

    That is the last message, of whatever role, as templates pass over roles that they do not know;
    the last question; and every part, tool's result, and system's or developer's message.

    A template may change what it writes, strip the thoughts of an earlier answer, say. So not the
    contents are looked for, but marks in their places.
    """
    users = [place for place, m in enumerate(messages, start=1) if has_role(m, USERS)]
    last = {len(messages), *users[-1:]}
    fresh, marked = count(FIRST), []
    sought: list[tuple[int, list[str]]] = []
    for place, message in enumerate(messages, start=1):
        content = message.get("content")
        if says_otherwise(message):  # beside which a template may leave the content out
            pass
        elif _has_parts(message):
            parts = [_marked(part, fresh) for part in content or ()]
            sought += [(place, marks) for _, marks in parts]
            message = {**message, "content": [part for part, _ in parts]}
        elif place in last or has_role(message, (*TOOLS, *GUIDES)):
            made, marks = _marked(content, fresh)
            sought.append((place, marks))
            message = {**message, "content": made}
        marked.append(message)
    try:
        text = tokenizer.apply_chat_template(marked, add_generation_prompt=asks, tokenize=False)
    except (TemplateError, TypeError):  # which tells nothing: the contents themselves are taken
        return
    if any(_has_parts(message) and str(message["content"]) in text for message in marked):
        raise TemplateError("it writes a content of several parts as it stands; give a text")
    for place, marks in sought:
        if marks and not any(mark in text for mark in marks):
            raise TemplateError(f"it leaves out what message {place} says")


def _marked(value: Any, fresh: Iterator[int]) -> tuple[Any, list[str]]:
    """Return a value with marks in the places of its texts and numbers, and the marks as written.

    Types and the names of keys, by which a template may go, stay.
    """
    if isinstance(value, str) and value.strip():
        word = f"mark{next(fresh)}"
        return word, [word]
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = next(fresh)
        return number, [str(number)]
    if isinstance(value, list | tuple):
        items = [_marked(item, fresh) for item in value]
        return [item for item, _ in items], [mark for _, marks in items for mark in marks]
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if name == "type"}
        rest = {name: _marked(item, fresh) for name, item in value.items() if name not in kept}
        made = {name: kept[name] if name in kept else rest[name][0] for name in value}
        return made, [mark for _, marks in rest.values() for mark in marks]
    return value, []


def _has_parts(message: dict[str, Any]) -> bool:
    """Return whether a message's content are parts, which are not what a tool has found."""
    content = message.get("content")
    if not isinstance(content, list):
        return False
    is_typed = all(isinstance(part, dict) and "type" in part for part in content)
    return (is_typed and len(content) > 0) or not has_role(message, TOOLS)


@contextmanager
def template_takes(number: int) -> Iterator[None]:
    """Name the row in what a chat template says of messages that it does not take.

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
