"""Which rows show all ways in which prompts end, on which depends how answers are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.messages import USER, is_messages
from laplace_lora.commands.reading.rows import Row

SPREAD = 8  # rows that are looked at in any case
ENDS = 128  # last tokens of prompts, the most frequent ones
LENGTH = 16  # of the end of a prompt, in characters, that decides on its last token
WORD = re.compile(r"\S?\s*\S*\s*\Z")  # with the spaces around it, beyond which few tokens reach


def rows_by_end(inputs: Inputs, rows: Sequence[Row]) -> list[int]:
    """Return numbers of rows, from 1: some in equal steps, and one for each last token of a prompt.

    A token reaches over few characters, so that of each prompt only the last word is tokenized, and
    no word twice. A character precedes it, since some tokenizers put a space before what begins a
    text, which merges with those that are there. So the token is the prompt's own with byte pairs,
    but not always with a unigram tokenizer, which weighs a whole text: an answer without a space
    before it may change how more of the prompt is divided. Behind a chat template prompts end as it
    has them end behind a message of the last one's role.
    """
    count = min(len(rows), SPREAD)
    numbers = {1 + i * len(rows) // count for i in range(count)}
    words = [_last_word(inputs, row) for row in rows]
    tokens = _last_tokens(sorted(set(words)), inputs.adapter.tokenizer)
    ends = [(tokens[word], _last_role(inputs, row)) for word, row in zip(words, rows, strict=True)]
    frequent = dict(Counter(ends).most_common(ENDS))
    first = {end: n for n, end in reversed(list(enumerate(ends, start=1)))}
    return sorted(numbers.union(n for end, n in first.items() if end in frequent))


def _last_tokens(ends: Sequence[str], tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Return the last token of each text, none of one that has none."""
    if not any(ends):
        return dict.fromkeys(ends, ())
    ids = tokenizer(list(ends), add_special_tokens=False)["input_ids"]
    return {end: tuple(tokens[-1:]) for end, tokens in zip(ends, ids, strict=True)}


def _last_role(inputs: Inputs, row: Row) -> str | None:
    """Return whose message precedes the answer, ``None`` where no template writes it."""
    messages: Any = row.get(inputs.plan.columns.text or "")
    if is_messages(messages):
        return str(messages[-1]["role"])
    return USER if inputs.plan.chat else None


def _last_word(inputs: Inputs, row: Row) -> str:
    """Return the last word before the answer, nothing where a template writes it."""
    if inputs.is_conversation(row):
        return ""
    text = inputs.second(row) or row.get(inputs.plan.columns.text or "")
    end = text[-LENGTH:] if isinstance(text, str) else ""
    found = WORD.search(end.encode(errors="ignore").decode())  # half a character has no tokens
    return found[0] if found else ""
