"""Answer tokens of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def target_tokens(targets: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the token of each answer.

    Args:
        targets: Two answers or more.
        tokenizer: The model's.

    Raises:
        ValueError: If an answer is no single token, two are the same one, or there is only one.
    """
    if len(targets) < 2:
        raise ValueError(f"--target needs two answers or more, got {targets[0]!r}")
    found = []
    for target in targets:
        ids = tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            parts = tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"--target {target!r} is {len(ids)} tokens of this tokenizer, {parts}; every "
                "answer must be one known token. A space before the word often makes the difference"
            )
        found += ids
    if len(set(found)) < len(found):
        raise ValueError(f"--target: two answers are the same token, {found}")
    return found
