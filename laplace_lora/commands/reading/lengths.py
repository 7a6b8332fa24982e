"""How many tokens an input may have, and cut one that has more."""

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


def cut_to(limit: int, text: str, second: str | None, tokenizer: Any, eos: bool) -> dict[str, Any]:
    """Return the tokens of a text that has too many.

    Args:
        limit: How many are read.
        text: The text.
        second: A second one, if there is one.
        tokenizer: The model's.
        eos: Whether the end-of-text token is read at the end of what is left.

    Raises:
        ValueError: If nothing is left of a text, or of one of two.
    """
    own = tokenizer.num_special_tokens_to_add(pair=second is not None) + eos
    found = dict(tokenizer(text, second, truncation=True, max_length=limit))
    least = own + 1 + (second is not None)
    if limit < least or len(found["input_ids"]) > limit:
        what = "a text" if second is None else "two texts"
        raise ValueError(
            f"--max-length {limit} leaves no room for {what}: {own} tokens are those that the "
            f"tokenizer puts around them; give {least} or more, or leave it out"
        )
    if eos:
        found["input_ids"][-1] = tokenizer.eos_token_id
    return found


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
