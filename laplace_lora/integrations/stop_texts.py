"""`StopTexts`: ends texts behind the strings that a task stops at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StopTexts:
    """Ends a text behind a stop, so that no more of it is written in vain.

    A logits processor, which sees one text at a time and not where its prompt ends, and a streamer,
    which is told of each token: all texts that go on have equally many.

    Args:
        tokenizer: The model's.
        until: The stops.
        ends: Tokens that end a text; without any, texts go on behind a stop and are cut afterwards.
            The text of the tokenizer's own is a stop, too, as it may be written in pieces.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], ends: Sequence[int]) -> None:
        own = tokenizer.eos_token_id
        end = "" if own is None else tokenizer.decode([own])
        self._until = (*until, end) if end else tuple(until)
        self._tokenizer, self._ends = tokenizer, ends
        self._written = -1  # the prompts come first

    def put(self, value: Tensor) -> None:
        """Count a token of each text."""
        self._written += 1

    def end(self) -> None:
        """Do nothing: the texts have ended."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that end the text if it has a stop, as they are otherwise.

        Args:
            ids: Its tokens so far, ``(1, tokens)``.
            scores: Of the next one, ``(1, vocabulary)``.
        """
        if not self._ends:
            return scores
        new = ids[0, ids.shape[1] - self._written :].tolist()
        text = self._tokenizer.decode(new)  # a stop may be a special token
        if not any(stop in text for stop in self._until):
            return scores
        ended = torch.full_like(scores, -torch.inf)
        ended[:, self._ends[0]] = 0
        return ended

    def cut(self, text: str) -> str:
        """Return a text up to its first stop."""
        for stop in self._until:
            text = text.split(stop)[0]
        return text
