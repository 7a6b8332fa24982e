"""What an encoder-decoder's decoder reads before an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from laplace_lora.commands.reading.adapter import Adapter
from laplace_lora.models.answers import AnswerPlace


def read_before(adapter: Adapter, answers: Sequence[str], tokens: Sequence[int]) -> list[int]:
    """Return the tokens that the decoder reads before an answer, as it did in the training.

    Returns:
        Empty if it is the token with which the decoder starts, or none is known.

    Raises:
        ValueError: If a target has not its answer's token, or another one before the answer than
            the others.
    """
    base: Any = adapter.model.get_base_model()
    start, tokenizer = AnswerPlace(base, None).start, adapter.tokenizer
    found = {
        answer: _before(answer, token, tokenizer)
        for answer, token in zip(answers, tokens, strict=True)
    }
    first, *others = answers
    before = found[first]
    for other in others:
        if found[other] != before:
            one, two = map(tokenizer.convert_ids_to_tokens, (before, found[other]))
            raise ValueError(
                f"--target: the tokenizer writes {one} before {first!r}, and {two} before "
                f"{other!r}; answers are compared where all have the same before them"
            )
    shifted = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    decoder: list[Any] = [start, *before]
    if shifted is not None:  # mBART has the target's last token, its language, as the first one
        labels = torch.tensor([_target(first, tokenizer)])
        try:
            decoder = shifted(labels=labels)[0, : len(before) + 1].tolist()
        except (TypeError, ValueError):
            if start is not None:
                raise
            return []
    elif start is None:
        return []
    return [] if decoder == [start] else decoder


def begins_targets(answer: str, tokenizer: Any) -> bool:
    """Return whether a tokenizer writes a token before an answer."""
    bare = tokenizer(text_target=answer, add_special_tokens=False)["input_ids"]
    return bool(_target(answer, tokenizer)[: len(bare)] != list(bare))


def _target(answer: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text_target=answer)["input_ids"])


def _before(answer: str, token: int, tokenizer: Any) -> list[int]:
    target = _target(answer, tokenizer)
    if token not in target:
        raise ValueError(
            f"--target {answer!r} is the token {tokenizer.convert_ids_to_tokens(token)!r} alone, "
            f"but the tokenizer makes {tokenizer.convert_ids_to_tokens(target)} of it as a target; "
            "give the tokens of the training from Python, as `target_ids`"
        )
    return target[: target.index(token)]
