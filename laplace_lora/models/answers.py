"""Where a language model's answer tokens are read, and which tokens these may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import batch_length
from laplace_lora.display.warning import warn
from laplace_lora.models.changes.narrowing import last_true
from laplace_lora.models.inputs.unmasked import check_is_masked

# Behind a template or a line break a word is often another token than alone.
BEHIND = (
    "`tokenizer(prompt + answer).input_ids[len(tokenizer(prompt).input_ids)]`, with prompts as the "
    "model reads them, chat template included, and answers with the space of the training, if any"
)


def checked_target_ids(target_ids: Sequence[int] | Tensor, vocabulary: int) -> Tensor:
    """Return answer tokens as a tensor.

    Args:
        target_ids: Two or more different indices.
        vocabulary: Number of tokens.

    Raises:
        ValueError: If they are fewer than two, repeated, no integers or outside the vocabulary.
    """
    message = f"`target_ids` must be two or more different integers, got {target_ids}"
    try:
        if any(isinstance(i, bool) for i in target_ids):
            raise TypeError("a boolean is no token")
        is_nested = any(isinstance(i, list | tuple) or getattr(i, "ndim", 0) for i in target_ids)
        ids = torch.empty(0) if is_nested else torch.as_tensor(target_ids)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{message}; the number of an answer's token is {BEHIND}") from None
    if is_nested:
        raise ValueError(
            f"{message}: lists of tokens, and an answer must be one, the one behind a prompt, "
            f"{BEHIND}; longer answers are compared by `laplace_lora.generation.score` of a "
            "posterior with likelihood='language_modeling'"
        )
    is_integer = not (ids.is_floating_point() or ids.dtype == torch.bool)
    ids = ids.long() if is_integer else ids
    if ids.ndim != 1 or len(ids) < 2 or not is_integer or len(ids.unique()) != len(ids):
        raise ValueError(message)
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"`target_ids` must lie in the vocabulary, 0..{vocabulary - 1}; got {ids.tolist()}"
        )
    return ids


class AnswerPlace:
    """The token after which a language model's answer stands.

    A decoder's last real token, the first step of an encoder-decoder's decoder or the last token of
    the batch's ``decoder_input_ids``, and in a masked language model the mask token itself.

    Args:
        base: The transformer.
        mask_token_id: The mask token of a masked language model.
    """

    def __init__(self, base: Any, mask_token_id: int | None) -> None:
        config = getattr(base, "config", None)
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self._config = config
        self._generation = getattr(base, "generation_config", None)
        generates = getattr(base, "can_generate", lambda: True)()
        self.is_masked = not generates and not self.is_encoder_decoder
        self._mask_token_id = (
            getattr(config, "mask_token_id", None) if mask_token_id is None else mask_token_id
        )
        self._kind = type(base).__name__

    @property
    def follows_text(self) -> bool:
        """Whether answers are tokens that follow texts."""
        return not (self.is_encoder_decoder or self.is_masked)

    @property
    def start(self) -> int | None:
        """The token with which a decoder starts, ``None`` if no configuration says."""
        return self._number("decoder_start_token_id")

    def check_reads_mask_token(self, target_ids: Any) -> None:
        """Refuse a mask token where outputs are read elsewhere.

        Args:
            target_ids: The answers, ``None`` if there are none.

        Raises:
            ValueError: If there are none, or the model is no masked language model.
        """
        if target_ids is None or not self.is_masked:
            raise ValueError(
                "`mask_token_id` says where a masked language model answers with `target_ids`; "
                f"{self._kind} with target_ids={target_ids} reads its outputs elsewhere"
            )

    def check_starts(self, head: Any) -> None:
        """Refuse a decoder that nothing tells what to answer, before it misses its own inputs.

        Args:
            head: The layer that gives the vocabulary's logits, ``None`` if there is none.

        Raises:
            ValueError: If an encoder-decoder writes text.
        """
        if self.is_encoder_decoder and head is not None:
            raise ValueError(
                f"{self._kind} writes text; give `target_ids`, the tokens with which it answers at "
                "its first decoder step, or LogitsModel an `output` callable and the batches "
                "`decoder_input_ids`"
            )

    def find(self, inputs: dict[str, Any], device: torch.device) -> tuple[Tensor | None, int]:
        """Return the token's index in each example, and how many tokens the indices count.

        Adds the first decoder step to an encoder-decoder's inputs if there is none.

        Args:
            inputs: The model's inputs.
            device: Where inputs go.

        Returns:
            Indices ``(batch,)``, ``None`` for the last token; and the number of tokens, 0 where
            there are no indices.

        Raises:
            ValueError: If a masked language model's mask token is unknown, or a text has not
                exactly one; no configuration says how a decoder starts; the attention mask has not
                one entry per token, or is missing where texts are padded.
        """
        if self.is_masked:
            if inputs.get("input_ids") is None:
                raise ValueError(
                    f"{self._kind} answers at a mask token, which is looked for in 'input_ids'; "
                    f"the batch has {sorted(inputs)} only"
                )
            return self._of_mask_token(inputs["input_ids"], inputs.get("attention_mask"))
        mask = inputs.get("attention_mask")
        if self.is_encoder_decoder:
            if inputs.get("decoder_input_ids") is None:
                inputs["decoder_input_ids"] = self._start(batch_length(inputs), device)
            mask = inputs.get("decoder_attention_mask")
        if mask is None:
            why = "the answer would be read after it"
            check_is_masked(inputs, self._config, why, decoder=self.is_encoder_decoder)
            return None, 0
        if mask.ndim != 2:
            raise ValueError(
                f"an attention mask of shape {tuple(mask.shape)} does not say where a text ends, "
                "after which the answer stands; give one entry per token, as a tokenizer does"
            )
        return last_true(mask), mask.shape[1]

    def warn_if_begins(self, logits: Tensor, target_ids: Tensor) -> None:
        """Warn where a decoder, at its first step, begins a text and does not answer yet.

        Args:
            logits: There, ``(batch, vocabulary)``.
            target_ids: The answers.
        """
        likeliest, answers = logits.argmax(-1), target_ids.tolist()
        for token in map(self._number, ("bos_token_id", "forced_bos_token_id")):
            if token is None or token in answers or 2 * (likeliest == token).sum() <= len(logits):
                continue
            warn(
                f"at its first decoder step, where answers are read, {self._kind} writes the token "
                f"{token}, which begins a text, and answers behind it. Give every batch "
                f"`decoder_input_ids`, with [{self.start}, {token}] in each row, if this is what "
                "tokenizer(text_target=answer) puts before an answer"
            )
            return

    def _number(self, name: str) -> int | None:
        """Return a token's number as the first configuration has it that names one."""
        sources = [self._config, getattr(self._config, "decoder", None), self._generation]
        found = [getattr(source, name, None) for source in sources]
        return next((token for token in found if token is not None), None)

    def _start(self, examples: int, device: torch.device) -> Tensor:
        start = self.start
        if start is None:
            raise ValueError(
                f"no configuration of {self._kind} says how its decoder starts; set "
                "`config.decoder_start_token_id`, or give the batches `decoder_input_ids`"
            )
        return torch.full((examples, 1), start, device=device)

    def _of_mask_token(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
        if self._mask_token_id is None:
            raise ValueError(
                f"{self._kind} answers at a mask token, which its configuration does not name; "
                "give the posterior, or LogitsModel, mask_token_id=tokenizer.mask_token_id"
            )
        masked = ids == self._mask_token_id
        if mask is not None and mask.shape == ids.shape:  # padding may hold any token
            masked &= mask != 0
        counts = masked.sum(1)
        if bool((counts != 1).any()):
            row = int((counts != 1).nonzero()[0])
            raise ValueError(
                f"{self._kind} answers at the mask token ({self._mask_token_id}), of which every "
                f"text needs exactly one; text {row} has {int(counts[row])}"
            )
        return last_true(masked), ids.shape[1]
