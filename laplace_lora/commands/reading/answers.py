"""Answer tokens of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPACES = (" ", "▁", "Ġ")  # as texts, SentencePiece's and GPT-2's vocabularies have them


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


def prompts_with_space(prompts: Sequence[Any], targets: Sequence[str], tokenizer: Any) -> list[int]:
    """Return which prompts end in a space before answers that begin with one.

    No text has the tokens of such a prompt and its answer: it would have two spaces.

    Args:
        prompts: Texts; messages, which a chat template ends, never do.
        targets: The answers.
        tokenizer: The model's; one that reads no spaces has none to meet.
    """
    tokens = tokenizer.convert_ids_to_tokens(target_tokens(targets, tokenizer))
    if not any(str(token).startswith(SPACES) for token in tokens):
        return []
    found = [n for n, text in enumerate(prompts) if isinstance(text, str) and text.endswith(" ")]
    ends = [prompts[n] for n in found[:1]]
    is_read = any(
        tokenizer(text)["input_ids"] != tokenizer(text.rstrip(" "))["input_ids"] for text in ends
    )
    return found if is_read else []
