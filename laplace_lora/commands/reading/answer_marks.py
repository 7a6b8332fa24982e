"""Say what is scored of an answer beyond the marks that a chat template puts around it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.rows import Row
from laplace_lora.likelihoods.language_modeling import IGNORED

MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def marks_said(inputs: Inputs, rows: Sequence[Row]) -> str | None:
    """Return which scored tokens of an answer stand outside of a template's marks, as a sentence.

    Args:
        inputs: How rows are read.
        rows: The data, of which the first conversation is looked at.

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
