"""`TokenModel`: a causal language model as a function from a batch to its scored tokens' logits.

Which tokens of a batch are scored, and running the vocabulary's head at these alone. A posterior
with the likelihood ``"language_modeling"`` is fitted on it: examples are sequences, the likelihood
of one is the product over its scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from laplace_lora.models.changes.modes import coarsest_dtype
from laplace_lora.models.changes.narrowing import at_tokens, last_true
from laplace_lora.models.logits_model import LogitsModel, wide
from laplace_lora.models.tolerances import near

TEXT = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"}
TOP_K = 20  # tokens that are predicted unless asked otherwise


class TokenModel(LogitsModel):
    """A causal language model from a batch to logits, ``(scored tokens, vocabulary)``.

    The head runs at the tokens that predict a scored one, and at no others, unless it is trained
    itself. Positions count real tokens only.

    Args:
        model: A `PeftModel` of a causal language model.

    Raises:
        ValueError: If it is none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self._wrapped.vocabulary_head is None or not self._answer.follows_text:
            raise ValueError(
                f"{self._wrapped.name} is not a causal language model; tokens can be "
                "predicted one by one with decoders loaded through AutoModelForCausalLM or "
                "AutoModelForImageTextToText; encoder-decoders answer by `target_ids`"
            )
        self._reads_forward = False  # until it has been seen to

    @property
    def n_outputs(self) -> int | None:
        """Size of the vocabulary."""
        return self.vocabulary_size

    @property
    def predicted_outputs(self) -> int | None:
        """Number of outputs of a prediction: the likeliest tokens, and one for all others."""
        return TOP_K + 1

    @property
    def end_tokens(self) -> list[int]:
        """Tokens that end a text, by the model's configuration; it may know of none."""
        tokens = self._special_token("eos_token_id")
        if tokens is None:
            return []
        ends: list[int] = torch.as_tensor(tokens, dtype=torch.long).flatten().tolist()
        return ends

    @property
    def pad_token(self) -> int:
        """Token that fills up texts; 0 if the model's configuration does not say."""
        return self._special_token("pad_token_id") or 0

    @property
    def generation_config(self) -> Any:
        """How texts are to be written, as PEFT's ``generate`` reads it; the model may not say."""
        own = getattr(self._wrapped.base, "generation_config", None)
        return getattr(self.model, "generation_config", own)

    @property
    def has_prompt(self) -> bool:
        """Whether PEFT puts a prompt before a text, tokens or keys and values."""
        return self._wrapped.has_prompt

    def accepts(self, argument: str) -> bool:
        """Return whether the transformer's forward pass takes an argument of this name."""
        return argument in self._wrapped.arguments

    @torch.no_grad()
    def check_reads_forward(self, others: Mapping[str, Tensor] | None = None) -> None:
        """Refuse an encoder under a vocabulary's head, which sees the tokens that it predicts.

        The model is tried, once, unless its configuration calls it a decoder; others of which it
        says no may be decoders all the same, such as GPT-NeoX.

        Args:
            others: What the model takes of a text beside its tokens, ``(1,)`` each.

        Raises:
            ValueError: If a token changes the logits before it.
        """
        if self._reads_forward or getattr(self.config, "is_decoder", None) is True:
            return
        texts = torch.tensor([[0, 1], [0, 2]], device=self.device)
        batch = {"input_ids": texts, "attention_mask": torch.ones_like(texts)}
        batch |= {key: torch.cat([value, value]) for key, value in (others or {}).items()}
        first = self._wrapped(self._wrapped.inputs(batch)).logits[:, 0]
        if not near(first[:1], first[1:], coarsest_dtype(self.model)):
            raise ValueError(
                f"{self._wrapped.name} reads texts in both directions, so it sees the tokens that "
                "it should predict; load a decoder (is_decoder=True, or causal=True of XLM and its "
                "like) and fine-tune it anew"
            )
        self._reads_forward = True

    def refusing_long_texts(self, tokens: int) -> AbstractContextManager[None]:
        """Say what to do where a twin fails at texts that are too long, see `WrappedModel`.

        Args:
            tokens: Of the texts, those in a cache included.
        """
        return self._wrapped.refusing_long_texts(tokens)

    def needs_positions(self, batch: Mapping[str, Any]) -> bool:
        """Return whether the transformer must be told positions, see `PositionRule`.

        Args:
            batch: A mapping with ``input_ids`` and, if padded on either side, ``attention_mask``.
        """
        inputs = self._wrapped.inputs(batch)
        self._count_real_tokens(inputs)
        return "position_ids" in inputs and "position_ids" not in batch

    def _special_token(self, name: str) -> Any:
        generation = getattr(self.generation_config, name, None)
        return getattr(self.config, name, None) if generation is None else generation

    def forward(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """Return the logits that predict the scored tokens, examples one after the other.

        Args:
            batch: A mapping with ``input_ids``, ``labels`` and, if padded, ``attention_mask``.

        Returns:
            Shape ``(scored tokens, vocabulary)``, float32 or better.

        Raises:
            TypeError: If the batch is no mapping with labels.
            ValueError: If the labels do not fit the tokens.
        """
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise TypeError("the batch has no 'labels', which mark the tokens to score")
        return self._logits_after(batch, *_scored(batch))

    def own_logits(self, batch: Mapping[str, Any] | Tensor) -> Tensor | None:
        """Return the logits that the model itself gives for a batch, see `LogitsModel`."""
        assert isinstance(batch, Mapping)
        if TEXT.issuperset(batch):  # a model of texts and images may need images to run
            self.check_reads_forward()
        rows, tokens = _scored(batch)
        logits = self._wrapped(self._wrapped.inputs(batch)).logits
        at = tokens.to(logits.device) + logits.shape[1] - batch["input_ids"].shape[1]
        return wide(logits[rows.to(logits.device), at])

    def log_likelihood(self, batch: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
        """Return each text's log probability of its scored tokens, ``(batch,)``.

        Args:
            batch: As for `forward`.
            temperature: Divides the logits.
        """
        logits = self(batch) / temperature
        labels = token_labels(batch, batch["labels"]).to(logits.device)
        scored = labels != IGNORED
        log_prob = -F.cross_entropy(logits, labels[scored], reduction="none")
        rows = scored.nonzero(as_tuple=True)[0]
        return logits.new_zeros(len(labels)).index_add(0, rows, log_prob)

    def next_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of the token that would follow, ``(batch, vocabulary)``.

        Args:
            batch: A mapping with ``input_ids`` and, if padded on either side, ``attention_mask``.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        last = last_true(torch.ones_like(ids) if mask is None else mask)
        return self._logits_after(batch, torch.arange(len(ids)), last)

    def _logits_after(self, batch: Mapping[str, Any], rows: Tensor, tokens: Tensor) -> Tensor:
        inputs = self._wrapped.inputs(batch)
        self._count_real_tokens(inputs)
        length = batch["input_ids"].shape[1]
        with at_tokens(self._wrapped.answering_head(), rows, tokens, length) as narrowed:
            logits = self._wrapped(inputs).logits
        if narrowed:
            return wide(logits[:, 0])
        at = tokens.to(logits.device) + logits.shape[1] - length  # a prompt may stand before them
        return wide(logits[rows.to(logits.device), at])


def _scored(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return example and index of the tokens that predict a scored one."""
    rows, tokens = (token_labels(batch, batch["labels"]) != IGNORED).nonzero(as_tuple=True)
    return rows, tokens - 1
