"""Predictions of texts' tokens as rows that metrics can count, and resamples of whole texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from laplace_lora.data.columns import padded
from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.language_modeling import IGNORED

TEXT = "text"  # column with the number of each token's text


def same_width(columns: Mapping[str, Sequence[Tensor]], team: Together) -> dict[str, list[Tensor]]:
    """Return columns whose batches all have as many tokens; those of single examples unchanged.

    Args:
        columns: Tensors of each batch: ``p``, ``(texts, tokens, classes)``, ``labels`` and others,
            ``(texts, tokens)``.
        team: The processes that share the batches.
    """
    width = team.longest(p.shape[1] for p in columns.get("p", ()) if p.ndim == 3)
    if not width:
        return {name: list(parts) for name, parts in columns.items()}

    def wide(name: str, part: Tensor) -> Tensor:
        if part.ndim == 1:
            raise ValueError(
                "predict gave class probabilities of every token, (batch, tokens, classes), so "
                f"labels must be (batch, tokens), got {tuple(part.shape)}"
            )
        return padded(part, width, IGNORED if name == "labels" else 0)

    return {name: [wide(name, part) for part in parts] for name, parts in columns.items()}


def by_token(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rows of tokens with a column for their text; rows of single examples unchanged.

    Tokens without a label are left out where there are labels, and padding, whose probabilities are
    zeros, everywhere.

    Args:
        rows: Columns as `same_width` makes them, of all batches.

    Raises:
        ValueError: If no token is labelled.
    """
    if not rows or rows["p"].ndim == 2:
        return dict(rows)
    counted = rows["p"].sum(-1) > 0
    if "labels" in rows:
        counted &= rows["labels"] != IGNORED
    if not bool(counted.any()):
        raise ValueError("no token has a label that counts: all are -100")
    flat = {name: column[counted] for name, column in rows.items()}
    return {**flat, TEXT: counted.nonzero(as_tuple=True)[0]}


def count_drawn(rows: Mapping[str, Tensor]) -> int:
    """Return how many examples or whole texts `resamples` draws."""
    return len(rows[TEXT].unique()) if TEXT in rows else len(rows["p"])


def resamples(
    rows: Mapping[str, Tensor], count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield indices of resampled rows: of examples, or of the tokens of resampled texts.

    Tokens of a text have errors in common, so that they are drawn together.

    Args:
        rows: As `by_token` makes them.
        count: How many resamples.
        generator: Their source.
    """
    if TEXT not in rows:
        n = len(rows["p"])
        yield from torch.randint(n, (count, n), generator=generator)
        return
    sizes = rows[TEXT].unique_consecutive(return_counts=True)[1]
    tokens = torch.arange(len(rows[TEXT])).split(sizes.tolist())
    for drawn in torch.randint(len(tokens), (count, len(tokens)), generator=generator).tolist():
        yield torch.cat([tokens[text] for text in drawn])
