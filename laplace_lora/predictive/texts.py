"""Texts as rows: what a tokenizer makes of each, and which it would not take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from laplace_lora.predictive.special_tokens import begins_itself, check_ends_open


def encoded(
    texts: Sequence[Any],
    tokenizer: Any,
    are_questions: bool = False,
    are_followed: bool = False,
) -> list[Mapping[str, Any]]:
    """Return texts as rows, one by one.

    Single texts that begin with the tokenizer's ``bos_token``, as chat templates write it, get no
    second one from a tokenizer that adds it, and nothing else, to every text.

    Args:
        texts: Strings or pairs of strings.
        tokenizer: The model's.
        are_questions: Whether a language model answers them, who must see their ends.
        are_followed: Whether the answers stand behind them, as a decoder's do.

    Raises:
        TypeError: If one is neither a string nor a pair of strings, or the tokenizer is none.
        ValueError: If there is no tokenizer, it cannot pad, it would cut a question's end, or it
            writes something where an answer follows.
    """
    if tokenizer is None:
        raise ValueError("texts need `tokenizer`, that of the model")
    check_pads(tokenizer)
    _check_texts(texts)
    if are_followed:
        check_ends_open(tokenizer)
    rows = [_row(text, tokenizer, truncation=True) for text in texts]
    if are_questions and getattr(tokenizer, "truncation_side", "right") == "right":
        _check_whole(rows, texts, tokenizer)
    return rows


def cut_texts(rows: Sequence[Any], texts: Sequence[Any], tokenizer: Any) -> list[int]:
    """Return which texts have lost a part in their rows, see `encoded`."""
    limit = getattr(tokenizer, "model_max_length", math.inf)
    full = [n for n, row in enumerate(rows) if len(row["input_ids"]) >= limit]
    return [n for n in full if len(_row(texts[n], tokenizer)["input_ids"]) > limit]


def check_pads(tokenizer: Any) -> None:
    """Refuse what cannot pad.

    Args:
        tokenizer: The model's.

    Raises:
        TypeError: If it is no tokenizer.
        ValueError: If it has no padding token.
    """
    if not hasattr(tokenizer, "pad_token"):
        raise TypeError(
            f"`tokenizer` must be the model's tokenizer, got {type(tokenizer).__name__}; of a "
            "pipeline it is `.tokenizer`, and AutoTokenizer.from_pretrained loads one by name"
        )
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no padding token; set `tokenizer.pad_token = tokenizer.eos_token` "
            "and the model's `config.pad_token_id` to its number"
        )


def is_text_pair(item: Any) -> bool:
    """Return whether an item is a text and its second one, of which one may be missing."""
    pair = isinstance(item, tuple | list) and len(item) == 2
    return pair and any(isinstance(part, str) for part in item)


def _check_texts(texts: Sequence[Any]) -> None:
    """Refuse items that are no texts, such as missing ones."""
    wrong = [n for n, text in enumerate(texts) if not _is_text(text)]
    if wrong:
        raise TypeError(
            f"items {wrong[:5]} are neither texts nor pairs of texts, such as {texts[wrong[0]]!r}; "
            "leave out what is missing; a conversation becomes a text by "
            "tokenizer.apply_chat_template(messages, tokenize=False)"
        )


def _is_text(item: Any) -> bool:
    return isinstance(item, str) or (
        is_text_pair(item) and all(isinstance(part, str) for part in item)
    )


def _row(text: Any, tokenizer: Any, **options: Any) -> Mapping[str, Any]:
    """Return a text's tokens; those that begin it once, where a chat template has written them."""
    first, second = (text, None) if isinstance(text, str) else text
    if second is None and begins_itself(first, tokenizer):
        options["add_special_tokens"] = False
    row: Mapping[str, Any] = tokenizer(first, second, **options)
    return row


def _check_whole(rows: Sequence[Any], texts: Sequence[Any], tokenizer: Any) -> None:
    """Refuse texts of which rows have lost the end."""
    cut = cut_texts(rows, texts, tokenizer)
    if cut:
        limit = tokenizer.model_max_length
        raise ValueError(
            f"texts {cut[:5]} have more tokens than the tokenizer's model_max_length={limit}, and "
            "cutting their ends, after which the answer stands, would change the question; shorten "
            "them, or set tokenizer.truncation_side = 'left'"
        )
