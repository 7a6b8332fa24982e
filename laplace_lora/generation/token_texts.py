"""What the tokens of a text read, one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from laplace_lora.display.tables import plain

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders show in place of part of a character
WINDOW = 8  # tokens: a character has four bytes at most


def token_texts(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """Return what each token adds to a text that has begun before the first of them.

    Joined, they read as the text does, behind the space in front of its first word: many decoders
    drop that space where a text begins, and so from every token that is decoded alone. A character
    made of several tokens stands with the last of these; the others add nothing.

    Args:
        tokens: Numbers of successive tokens.
        tokenizer: With a ``decode``.
    """
    # Any token will do for the text before, unless it is part of a character.
    before = [t for t in tokens[:1] if BROKEN not in tokenizer.decode([t])]
    sequence, texts = [*before, *tokens], list[str]()
    start, shown = 0, len(before)  # of the window that is decoded; of what has its text
    for end in range(shown + 1, len(sequence) + 1):
        old = str(tokenizer.decode(sequence[start:shown]))
        new = str(tokenizer.decode(sequence[start:end]))
        if new.endswith(BROKEN) and end < len(sequence) and end - shown < WINDOW:
            texts.append("")
            continue
        texts.append(new[_shared(old, new) :])
        start, shown = (shown if texts[-1] else max(start, end - WINDOW)), end
    return texts


def text_rows(
    by_text: Mapping[str, Sequence[Any]],
    by_token: Mapping[str, Tensor],
    mask: Tensor,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """Return a mapping for each text, with its tokens as a list of mappings.

    Args:
        by_text: A value of each text, by name.
        by_token: Values of the tokens, ``(texts, length)``, by name; ``token`` is their numbers.
        mask: Where there are tokens, ``(texts, length)``.
        tokenizer: The model's; adds what texts and tokens read.
    """
    rows = []
    for i, real in enumerate(mask):
        columns = {name: plain(values[i][real]) for name, values in by_token.items()}
        row: dict[str, Any] = {name: values[i] for name, values in by_text.items()}
        if tokenizer is not None:
            row = {"text": str(tokenizer.decode(columns["token"])), **row}
            columns = {"text": token_texts(columns["token"], tokenizer), **columns}
        tokens = zip(*columns.values(), strict=True)
        row["tokens"] = [dict(zip(columns, values, strict=True)) for values in tokens]
        rows.append(row)
    return rows


def _shared(first: str, second: str) -> int:
    """Return with how many equal characters two texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
