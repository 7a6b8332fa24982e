"""How many tokens an input may have."""

from __future__ import annotations

from typing import Any

from torch import nn

UNLIMITED = 1_000_000  # tokenizers without a limit say a huge number
TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe")


def longest_input(tokenizer: Any, model: nn.Module) -> int | None:
    """Return how many tokens tokenizer and model take, ``None`` for no limit."""
    declared = getattr(model.config, "max_position_embeddings", None)
    limits = [tokenizer.model_max_length, declared, positions(model)]
    known = [n for n in limits if isinstance(n, int) and 0 < n < UNLIMITED]
    return min(known) if known else None


def positions(model: nn.Module) -> int | None:
    """Return for how many tokens a model has a position, ``None`` if it has no table of them.

    A model that computes its positions, as by rotations, declares a length that is no limit.
    """
    declared = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(declared, int):
        return None
    tables = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding)
    ]
    if not tables:
        return None
    # RoBERTa and its like count positions from the one after the padding's.
    return min(declared - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables)


def check_length(asked: int | None, model: nn.Module) -> None:
    """Refuse inputs that are longer than a model's positions.

    Args:
        asked: Tokens of the longest input, as the command line says; ``None`` for nothing.
        model: The base model.

    Raises:
        ValueError: If the model has fewer positions.
    """
    limit = positions(model)
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(
            f"--max-length {asked}: the model has positions for {limit} tokens; give {limit} or "
            "less, or leave it out"
        )
