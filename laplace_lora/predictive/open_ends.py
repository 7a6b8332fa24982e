"""Tokenizers that write behind a text, where a decoder's answer or continuation belongs."""

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
