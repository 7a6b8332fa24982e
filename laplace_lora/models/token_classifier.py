"""`TokenClassifier`: a model with a label per token, from a batch to the logits of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.token_classification import class_labels, real_tokens
from laplace_lora.models.logits_model import LogitsModel, wide


class TokenClassifier(LogitsModel):
    """A token classifier from a batch to logits, ``(tokens that count, classes)``.

    Those that count are the labelled ones, where a batch has ``labels``; otherwise all but padding.

    Args:
        model: A `PeftModel` of a model as `AutoModelForTokenClassification` loads it.

    Raises:
        ValueError: If the model predicts words, not classes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self._wrapped.vocabulary_head is not None:
            raise ValueError(
                f"{self._wrapped.name} predicts a vocabulary, not classes; load the model "
                "with AutoModelForTokenClassification"
            )

    def forward(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """Return the logits of the tokens that count, texts one after the other.

        Args:
            batch: A mapping with ``input_ids`` and, if padded, ``attention_mask``; with ``labels``
                that are -100 at tokens that do not count.

        Returns:
            Shape ``(tokens that count, classes)``, float32 or better.

        Raises:
            TypeError: If the batch is no mapping of texts.
            ValueError: If the labels do not fit the tokens, or the model has no logits for each.
        """
        counted = _counted(batch)
        assert isinstance(batch, Mapping)
        logits = self._logits(self._wrapped(self._wrapped.inputs(batch)))
        texts, tokens = counted.shape
        if logits.ndim != 3 or len(logits) != texts or logits.shape[1] < tokens:
            raise ValueError(
                f"{self._wrapped.name} returned logits of shape {tuple(logits.shape)}, "
                f"expected ({texts}, {tokens}, classes); load the model with "
                "AutoModelForTokenClassification"
            )
        logits = logits[:, logits.shape[1] - tokens :]  # a prompt may stand before the tokens
        return wide(logits[counted.to(logits.device).nonzero(as_tuple=True)].to(self.device))

    def own_logits(self, batch: Mapping[str, Any] | Tensor) -> Tensor | None:
        """Return the logits, which are the model's own already."""
        return self(batch)


def _counted(batch: Any) -> Tensor:
    """Return which tokens count, ``(batch, tokens)``."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        return real_tokens(batch)
    return class_labels(batch, batch["labels"]) != IGNORED
