"""`SpanModel`: a question-answering model, from a batch to the logits of starts and ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.question_answering import NOT_INPUTS, text_tokens
from laplace_lora.models.logits_model import LogitsModel, wide

FAR_BELOW = 60.0  # exp(-60) is nothing beside 1, in every dtype


class SpanModel(LogitsModel):
    """A question-answering model from a batch to logits, ``(batch, 2 · tokens)``.

    First those of every token as an answer's start, then as its end; padding has no probability.

    Args:
        model: A `PeftModel` of a model as `AutoModelForQuestionAnswering` loads it.
    """

    @property
    def n_outputs(self) -> int | None:
        """``None``: twice as many as the texts of a batch have tokens."""
        return None

    @property
    def predicted_outputs(self) -> int | None:
        """Outputs that memory grows with: those of one column, as samples have no Jacobians."""
        return 3

    def forward(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """Return the logits of starts and ends.

        Args:
            batch: A mapping with ``input_ids`` and, if padded, ``attention_mask``.

        Returns:
            Shape ``(batch, 2 · tokens)``, float32 or better.

        Raises:
            TypeError: If the batch is no mapping of texts.
            ValueError: If the model gives no logits of starts and ends for each token.
        """
        real = text_tokens(batch).to(self.device)
        assert isinstance(batch, Mapping)
        texts = {key: value for key, value in batch.items() if key not in NOT_INPUTS}
        returned = self._wrapped(self._wrapped.inputs(texts))
        parts = [getattr(returned, name, None) for name in ("start_logits", "end_logits")]
        tokens = real.shape[1]
        if any(p is None or p.ndim != 2 or p.shape[1] < tokens for p in parts):
            raise ValueError(
                f"{self._wrapped.name} returned no start and end for each of {tokens} "
                "tokens; load the model with AutoModelForQuestionAnswering"
            )
        # Labels count from the first logit, so image patches (LayoutLMv3) stand behind the text.
        where = slice(-tokens, None) if self._wrapped.has_prompt else slice(tokens)
        logits = [
            _without_padding(wide(part[:, where].to(self.device)), real)
            for part in parts
            if part is not None
        ]
        return torch.cat(logits, dim=-1)

    def own_logits(self, batch: Mapping[str, Any] | Tensor) -> Tensor | None:
        """Return the logits, which are the model's own already."""
        return self(batch)


def _without_padding(logits: Tensor, real: Tensor) -> Tensor:
    """Return logits that give padding no probability, whatever stood there.

    A constant below a row's lowest logit; minus infinity leaves no difference to compare.
    """
    lowest = logits.detach().masked_fill(~real, torch.inf).amin(1, keepdim=True)
    return torch.where(real, logits, lowest - FAR_BELOW)
