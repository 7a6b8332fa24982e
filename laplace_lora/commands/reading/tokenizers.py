"""The tokenizer that goes with an adapter, and how many tokens it and the model take."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from laplace_lora.commands.reading.repository import file_of
from laplace_lora.models.inputs.configs import longest_text
from laplace_lora.models.wrapped_model import places_of

UNLIMITED = 1_000_000  # tokenizers without a limit say a huge number


def tokenizer_of(
    adapter: str, base: str, model: Any, saved: dict[str, torch.Tensor], is_head: bool
) -> Any:
    """Return the tokenizer saved with the adapter, or else the base model's, able to pad."""
    source = base if file_of(adapter, "tokenizer_config.json") is None else adapter
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:  # many decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has neither a padding nor an ending token")
    _tell_padding(model.config, tokenizer, is_head)
    rows = len(model.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        if not any("embed" in name and "lora_" not in name for name in saved):
            raise ValueError(
                f"the tokenizer of {source} has {len(tokenizer)} tokens, the base model {rows}, "
                "and the adapter brings none: the embeddings of the others would be random"
            )
        model.resize_token_embeddings(len(tokenizer))
    return tokenizer


def _tell_padding(config: Any, tokenizer: Any, is_head: bool) -> None:
    """Let a model know the padding token, by which a classifying decoder finds a text's end.

    An adapter does not save what its training set there. Padding before the text is never taken
    for its end.
    """
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    if is_head and tokenizer.padding_side == "right":
        config.pad_token_id = tokenizer.pad_token_id
        config.get_text_config().pad_token_id = tokenizer.pad_token_id


def longest_input(tokenizer: Any, model: nn.Module) -> int | None:
    """Return how many tokens tokenizer and model take, ``None`` for no limit."""
    limits = [tokenizer.model_max_length, longest_text(model.config), places_of(model)]
    known = [n for n in limits if isinstance(n, int) and 0 < n < UNLIMITED]
    return min(known) if known else None


def check_length(asked: int | None, places: int | None) -> None:
    """Refuse inputs that are longer than a model's positions; ``None`` for no limit.

    Raises:
        ValueError: If the model has fewer positions.
    """
    if asked is not None and places is not None and asked > places:
        raise ValueError(
            f"--max-length {asked}: the model has positions for {places} tokens; give {places} or "
            "less, or leave it out"
        )
