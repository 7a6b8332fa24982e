"""The loop that continues texts, whatever predicts the next token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_lora.generation.next_token import NextToken, NextTokenPredictor
from laplace_lora.generation.reading import Reading
from laplace_lora.generation.sampled_predictor import SampledPredictor
from laplace_lora.generation.sampled_token import SampledToken
from laplace_lora.generation.selection import Selection
from laplace_lora.likelihoods.links import check_finite

STOP_ON = ("token", "answer")


class Streamer(Protocol):
    """What is told of tokens as they are written."""

    def put(self, value: Tensor) -> None:
        """Take the prompts, ``(texts, tokens)``, and then the new tokens, ``(texts,)``."""

    def end(self) -> None:
        """Be told that no more come."""


class ExactSteps:
    """Steps of exact moments: the whole text anew for each token.

    Args:
        predictor: Of single tokens.
        ids: Prompts, padded on the left.
        mask: Where they are real.
    """

    def __init__(self, predictor: NextTokenPredictor, ids: Tensor, mask: Tensor) -> None:
        self._predictor, self._ids, self._mask = predictor, ids, mask
        self._rows = torch.arange(len(ids))  # of the prompts that go on
        self._prediction: NextToken

    def scores(self) -> Tensor:
        """Return scores of the candidates, log probabilities up to a constant.

        No other token is chosen unless it is forced.

        Returns:
            Shape ``(texts, vocabulary)``.

        Raises:
            FloatingPointError: If logits are not finite; names the rows of the prompts.
        """
        texts = {"input_ids": self._ids, "attention_mask": self._mask}
        self._prediction = found = self._predictor(texts, rows=self._rows)
        vocabulary: Any = self._predictor.model.vocabulary_size
        scores = found.log_probabilities.new_full((len(self._ids), vocabulary), -torch.inf)
        # So that without uncertainty they are the MAP's logits.
        constant = found.mean[:, :1] - found.map_log_probabilities[:, :1]
        return scores.scatter(-1, found.candidates, found.log_probabilities + constant)

    def chosen(self, tokens: Tensor) -> NextToken:
        """Return the prediction, with the chosen tokens among the candidates."""
        found = self._prediction
        if bool((found.candidates == tokens.unsqueeze(-1)).any(-1).all()):
            return found
        # A processor has forced a token that was none of them.
        return self._predictor({"input_ids": self._ids, "attention_mask": self._mask}, tokens)

    def go_on(self, tokens: Tensor, texts: Tensor) -> None:
        """Append tokens, and keep the texts that go on, given by their indices."""
        self._rows = self._rows[texts.to(self._rows.device)]
        column = tokens.unsqueeze(1)
        self._ids = torch.cat([self._ids, column], dim=1)[texts]
        self._mask = torch.cat([self._mask, torch.ones_like(column)], dim=1)[texts]


class SampledSteps:
    """Steps of the linearised model's samples: each reads one more token.

    Args:
        predictor: Of tokens from logits and tangents.
        reading: The prompts, not yet read.
        top_k: Tokens to look at.
    """

    def __init__(self, predictor: SampledPredictor, reading: Reading, top_k: int) -> None:
        self._predictor, self._reading, self._top_k = predictor, reading, top_k
        self._token: SampledToken
        self._rows: Tensor | None = None  # of the prompts that go on

    def scores(self) -> Tensor:
        """Return scores of the whole vocabulary, log probabilities up to a constant.

        Returns:
            Shape ``(texts, vocabulary)``.

        Raises:
            FloatingPointError: If logits are not finite; names the rows of the prompts.
        """
        logits, tangents = self._reading.last_logits()
        check_finite(logits, self._rows)
        self._token = self._predictor.token(logits, tangents)
        return self._token.scores

    def chosen(self, tokens: Tensor) -> NextToken:
        """Return the prediction, with the chosen tokens among the candidates."""
        return self._token.of(tokens, self._top_k)

    def go_on(self, tokens: Tensor, texts: Tensor) -> None:
        """Let the tokens of the texts that go on, given by their indices, be read next."""
        rows = torch.arange(len(tokens)) if self._rows is None else self._rows
        self._rows = rows[texts.to(rows.device)]
        self._reading.keep(texts)
        self._reading.append(tokens[texts])


@dataclass(frozen=True)
class Stopping:
    """When a text is ended for its uncertainty.

    Attributes:
        above: Nats of mutual information; ``None`` never.
        on: ``"token"``, or ``"answer"`` for the sum over the tokens so far.

    Raises:
        ValueError: If the limit is negative, ``on`` is neither, or the answer is to be compared
            with no limit.
    """

    above: float | None = None
    on: str = "token"

    def __post_init__(self) -> None:
        if self.above is not None and not self.above >= 0:
            raise ValueError(f"stop_above must be zero or more nats, got {self.above}")
        if self.on not in STOP_ON:
            raise ValueError(f"stop_on must be one of {STOP_ON}, got {self.on!r}")
        if self.above is None and self.on != "token":
            raise ValueError(f"stop_on={self.on!r} needs a limit to compare with: give stop_above")

    def doubts(self, token: Tensor, answer: Tensor) -> Tensor:
        """Return which texts are too uncertain.

        Args:
            token: Mutual information of the last token, ``(texts,)``.
            answer: Its sum so far.
        """
        if self.above is None:
            return torch.zeros_like(token, dtype=torch.bool)
        return (token if self.on == "token" else answer) > self.above


@dataclass(frozen=True)
class Written:
    """Texts that were continued.

    Attributes:
        ids: Prompts and new tokens, ``(texts, tokens)``; zero where ``mask`` is.
        mask: Which of them are real.
        predictions: Of each step.
        tokens: Chosen in each step.
        where: Text and step of each.
        stopped: Which texts were ended for their uncertainty, ``(texts,)``.
    """

    ids: Tensor
    mask: Tensor
    predictions: list[NextToken]
    tokens: list[Tensor]
    where: list[tuple[Tensor, Tensor]]
    stopped: Tensor


def write(
    steps: ExactSteps | SampledSteps,
    ids: Tensor,
    mask: Tensor,
    places: Iterable[int],
    selection: Selection,
    ends: Tensor,
    stopping: Stopping,
    streamer: Streamer | None,
    pad: int,
) -> Written:
    """Continue texts until each has ended.

    Args:
        steps: What predicts the next token.
        ids: Prompts, padded on the left.
        mask: Where they are real.
        places: Numbers of the new tokens, at most as many as are written.
        selection: Which token follows.
        ends: Tokens that end a text.
        stopping: When uncertainty ends it.
        streamer: Told of every token; of the padding token where a text has ended.
        pad: The padding token.
    """
    live = torch.arange(len(ids), device=ids.device)
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    answers: Any = 0.0
    predictions, tokens, where = [], [], []
    if streamer is not None:
        streamer.put(ids.masked_fill(mask == 0, pad).cpu())
    for step in places:
        token = selection(steps.scores(), ids[live], mask[live])
        seen = steps.chosen(token)
        predictions.append(seen)
        tokens.append(token)
        where.append((live, torch.full_like(live, step)))
        ids, mask = (torch.cat([x, torch.zeros_like(x[:, :1])], dim=1) for x in (ids, mask))
        ids[live, -1], mask[live, -1] = token, 1
        if streamer is not None:
            streamer.put(ids[:, -1].masked_fill(mask[:, -1] == 0, pad).cpu())
        answers = answers + seen.mutual_information
        doubtful = stopping.doubts(seen.mutual_information, answers)
        stopped[live] = doubtful
        (stay,) = (~(torch.isin(token, ends) | doubtful)).nonzero(as_tuple=True)
        live, answers = live[stay], answers[stay]
        if not len(live):
            break
        steps.go_on(token, stay)
    if streamer is not None:
        streamer.end()
    return Written(ids, mask, predictions, tokens, where, stopped)
