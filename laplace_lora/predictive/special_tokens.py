"""Tokens that a tokenizer writes around a text by itself."""

from __future__ import annotations

from typing import Any


def check_ends_open(tokenizer: Any) -> None:
    """Refuse a tokenizer that writes behind a text.

    Args:
        tokenizer: Of a decoder, whose texts are to be answered or continued.

    Raises:
        ValueError: If it does.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = tokenizer("a")["input_ids"]
    if bare and found[-len(bare) :] != bare:
        raise ValueError(
            f"the tokenizer ends every text with {tokenizer.decode(found[-1:])!r}, behind which no "
            "answer and no continuation belongs; load it with add_eos_token=False, or let its "
            "tokenizer_config.json say so"
        )


def begins_itself(text: str, tokenizer: Any) -> bool:
    """Return whether a text has the token that begins it, and is to get no second one.

    Chat templates write it. A tokenizer that writes anything else by itself is left to do so.
    """
    begins = getattr(tokenizer, "bos_token", None)
    if not begins or not text.startswith(begins):
        return False
    written: list[int] = tokenizer("")["input_ids"]
    return written == [tokenizer.bos_token_id]
