"""Say how rows are read, as far as it may not be what was meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from laplace_lora.adapters.selection import listed
from laplace_lora.commands.reading.adapter import HEAD
from laplace_lora.commands.reading.columns import (
    CHOSEN,
    REJECTED,
    TEXTS,
    Columns,
    are_pairs,
    present_in,
)
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.likelihood import WITHOUT_LABELS
from laplace_lora.commands.reading.messages import ASKING, ASSISTANT, has_role, is_messages
from laplace_lora.commands.reading.pairs import lengths_of
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.rows import Row
from laplace_lora.likelihoods.language_modeling import IGNORED

MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SHOWN = 8  # columns that are not read


def reading_said(inputs: Inputs, rows: Sequence[Row], examples: Any) -> str:
    """Return how a fit reads its rows, as far as it may not be what was meant."""
    plan, tokenizer = inputs.plan, inputs.adapter.tokenizer
    said = (
        columns_said(plan, rows),
        cuts_said(inputs, examples, rows),
        decoder_said(plan, tokenizer),
        marks_said(inputs, rows),
    )
    return "\n".join(filter(None, said))


def columns_said(plan: Plan, rows: Sequence[Row]) -> str:
    """Return which columns are read, and which are not, as a sentence."""
    columns, likelihood = plan.columns, plan.likelihood
    texts = [columns.text, columns.pair, columns.completion]
    if are_pairs(rows, likelihood):
        texts += [CHOSEN, REJECTED]
    read = [repr(name) for name in texts if name is not None]
    label = None if likelihood in WITHOUT_LABELS else columns.label
    if label is not None:
        read.append(f"label {label!r}")
    left = [n for n in present_in(rows) if n not in (*texts, label)]
    said = f"Reads {' and '.join(read)}"
    if left:
        said = f"{said}; {listed(left, SHOWN)} {'is' if len(left) == 1 else 'are'} not read"
    count = sum(_has_earlier_answers(columns, row) for row in rows)
    if likelihood == "language_modeling" and count:
        said = (
            f"{said}. In {count} of {len(rows)} conversations the assistant answers several times: "
            "the last answer of each is scored, earlier ones are read as context"
        )
    return f"{said}."


def _has_earlier_answers(columns: Columns, row: Row) -> bool:
    """Return whether a conversation has answers of the assistant's before its last message."""
    messages = row.get(columns.text or "")
    is_whole = columns.completion is None or row.get(columns.completion) is None
    if not isinstance(messages, list) or not is_whole:
        return False
    return any(message["role"] == ASSISTANT for message in messages[:-1])


def prompts_said(plan: Plan, rows: Sequence[Row]) -> str | None:
    """Return which column beside preference pairs may hold prompts and is not read, as a sentence.

    Raises:
        ValueError: If the answers of a pair, messages, would then stand alone.
    """
    left = [name for name in TEXTS if name in present_in(rows)]
    if plan.columns.text is not None or not left:
        return None
    said = f"{left[0]!r} is not read: the fit's pairs had none; --text-field {left[0]} reads it"
    for number, row in enumerate(rows, start=1):
        for name in (CHOSEN, REJECTED):
            if _begins_with_answer(row.get(name)):
                raise ValueError(
                    f"row {number}: the messages in its column {name!r} begin with an answer, and "
                    f"{said}. If they are all that there is to read, leave that column out"
                )
    return f"{said}."


def _begins_with_answer(content: Any) -> bool:
    return is_messages(content) and not has_role(content[0], ASKING)


def cuts_said(
    inputs: Inputs, examples: Any, rows: Sequence[Row], source: str | None = None
) -> str | None:
    """Return how many texts are cut, as a sentence; ``None`` if none is."""
    limit = inputs.plan.max_length
    if limit is None or inputs.adapter.kind != HEAD:  # others are refused
        return None
    whole, count = Inputs(inputs.adapter, replace(inputs.plan, max_length=None)), 0
    for n, (row, example) in enumerate(zip(rows, examples, strict=True), start=1):
        if max(lengths_of(example)) < limit:
            continue
        uncut = whole.preference(row, n) if CHOSEN in example else whole.text(row, n)
        count += sum(length > limit for length in lengths_of(uncut))
    if not count:
        return None
    total = sum(len(lengths_of(example)) for example in examples)
    texts = "texts" if source is None else f"texts of {source}"
    return f"{count} of {total} {texts} {'is' if count == 1 else 'are'} cut to {limit} tokens."


def decoder_said(plan: Plan, tokenizer: Any) -> str | None:
    """Return what the decoder reads before an answer, as a sentence, if it is no plain start.

    Tokenizers for many languages begin targets with the name of one.
    """
    if not plan.decoder:
        return None
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(plan.decoder)))
    said = f"Before an answer the decoder reads {names}."
    # Not the attribute, which the first target sets to the default.
    if hasattr(tokenizer, "tgt_lang") and tokenizer.init_kwargs.get("tgt_lang") is None:
        said = (
            f"{said} The tokenizer names no target language (`tgt_lang`), so that this one is its "
            "default; if the training had another, save its tokenizer with the adapter."
        )
    return said


def marks_said(inputs: Inputs, rows: Sequence[Row]) -> str | None:
    """Return which scored tokens of an answer stand outside of a template's marks, as a sentence.

    The first conversation is looked at.

    Returns:
        ``None`` if all are inside, or there are no marks or no conversations.
    """
    if inputs.plan.likelihood != "language_modeling":
        return None
    n = next((n for n, row in enumerate(rows, start=1) if inputs.is_conversation(row)), 0)
    tokenizer = inputs.adapter.tokenizer
    if not n or MARK.search(tokenizer.get_chat_template()) is None or not tokenizer.is_fast:
        return None
    prompt, answer = inputs.prompt_and_answer(rows[n - 1], n)
    labels = inputs.scored(rows[n - 1], n)["labels"]
    marked = tokenizer.apply_chat_template(
        [*prompt, *answer], return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    pairs = zip(labels, marked, strict=True)
    beyond = [token for token, is_marked in pairs if token != IGNORED and not is_marked]
    if not beyond:
        return None
    return (
        f"Of an answer {tokenizer.decode(beyond)!r} is scored as well, which stands outside of the "
        "chat template's {% generation %} marks: a training on completions has it, one with TRL's "
        "assistant_only_loss has not; for that one's likelihood fit on its loader, from Python."
    )
