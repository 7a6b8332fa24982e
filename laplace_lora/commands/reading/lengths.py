"""How many tokens an input may have."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace_lora.models.inputs.configs import longest_text
from laplace_lora.models.wrapped_model import places_of

UNLIMITED = 1_000_000  # tokenizers without a limit say a huge number


def longest_input(tokenizer: Any, model: nn.Module) -> int | None:
    """Return how many tokens tokenizer and model take, ``None`` for no limit."""
    limits = [tokenizer.model_max_length, longest_text(model.config), places_of(model)]
    known = [n for n in limits if isinstance(n, int) and 0 < n < UNLIMITED]
    return min(known) if known else None


def check_length(asked: int | None, model: nn.Module) -> None:
    """Refuse inputs that are longer than a model's positions.

    Args:
        asked: Tokens of the longest input, as the command line says; ``None`` for nothing.
        model: The base model.

    Raises:
        ValueError: If the model has fewer positions.
    """
    limit = places_of(model)
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(
            f"--max-length {asked}: the model has positions for {limit} tokens; give {limit} or "
            "less, or leave it out"
        )
