"""`Selection`: which token is written next, with the options of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Selection:
    """A rule from scores of the vocabulary to a token.

    In this order: the penalty, the processor, the temperature, the ``top_k`` likeliest, the
    ``top_p`` likeliest, a draw. The last four only if tokens are drawn.

    Attributes:
        do_sample: Draw, instead of taking the likeliest.
        temperature: Divides the scores.
        top_k: Draw among so many.
        top_p: Draw among the likeliest that together have this probability.
        repetition_penalty: Divides positive scores of tokens that are in the text already, and
            multiplies negative ones; 1 for none (Keskar et al. 2019, *CTRL*, arXiv:1909.05858).
        processor: From tokens so far ``(1, tokens)`` and scores ``(1, vocabulary)`` to scores, such
            as a ``LogitsProcessorList``. It is called for each text alone and sees no padding, so
            that a text does not depend on its neighbours.
        generator: Source of the draws.

    Raises:
        ValueError: If a number is out of range, or a temperature or ``top_p`` is given although
            nothing is drawn.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    processor: Processor | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise ValueError("temperature and top_p shape draws; they need do_sample=True")

    def __call__(self, scores: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return a token for each text, ``(texts,)``.

        Args:
            scores: Log probabilities up to a constant, ``(texts, vocabulary)``.
            ids: Tokens so far, ``(texts, tokens)``.
            mask: Which of them are real.

        Raises:
            FloatingPointError: If scores are not a number; names the texts.
            ValueError: If the processor leaves a text no token.
        """
        if self.repetition_penalty != 1:
            scores = self._penalised(scores, ids, mask)
        if self.processor is not None:
            scores = torch.cat(
                [
                    self.processor(text[real != 0].unsqueeze(0), of_text.unsqueeze(0))
                    for text, real, of_text in zip(ids, mask, scores, strict=True)
                ]
            )
        _check_scores(scores)
        if not self.do_sample:
            return scores.argmax(-1)
        scores = scores / self.temperature
        values, tokens = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1)
        p = values.softmax(-1)
        # The likeliest stays, whatever the limit.
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)
        return tokens.gather(-1, torch.multinomial(p, 1, generator=self.generator)).squeeze(-1)

    def _penalised(self, scores: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        present = torch.zeros_like(scores).scatter_add_(1, ids, (mask != 0).to(scores)) > 0
        factor = self.repetition_penalty
        return torch.where(
            present, torch.where(scores > 0, scores / factor, scores * factor), scores
        )


def _check_scores(scores: Tensor) -> None:
    """Refuse scores of which no token can be chosen: the largest would be the first one."""
    largest = scores.amax(-1)  # NaN if any is
    if bool(largest.isnan().any()):
        raise FloatingPointError(
            f"scores are not a number in rows {largest.isnan().nonzero().flatten().tolist()} of "
            "the texts that go on; look for NaN in their inputs, the model or the processor"
        )
    if bool((largest == -torch.inf).any()):
        raise ValueError(
            "the logits_processor leaves a text no token to choose; with method='exact' only the "
            "`top_k` candidates have a score: raise top_k, or use method='sampled'"
        )
