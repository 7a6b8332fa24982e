"""Predictions of texts' tokens as rows that metrics can count, and resamples of whole texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from laplace_lora.data.batches import Batch, batch_labels, has_labels
from laplace_lora.data.columns import padded
from laplace_lora.data.distributed import Together
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.language_modeling import IGNORED

TEXT = "text"  # column with the number of each token's text
MARKS = "marks"  # column that says which out-of-distribution tokens count
LABELLED, UNLABELLED = 0, 1  # marks beside `IGNORED`: of a token with a label, of all without any


def token_marks(batch: Batch, label_key: str, p: Tensor) -> Tensor:
    """Return which tokens of out-of-distribution texts count, by labels whose values do not.

    Args:
        batch: Of texts, with labels or without.
        label_key: Key of the labels.
        p: Probabilities of the tokens, ``(texts, tokens, classes)``.

    Returns:
        ``(texts, tokens)``: `LABELLED` or `IGNORED`, or `UNLABELLED` if there is no label per
        token.
    """
    unlabelled = torch.full(p.shape[:2], UNLABELLED)
    try:
        labels = batch_labels(batch, label_key).cpu() if has_labels(batch, label_key) else None
    except TypeError:  # what texts are called may be no numbers
        return unlabelled
    if labels is None or labels.shape != unlabelled.shape:
        return unlabelled
    return torch.where(labels == IGNORED, IGNORED, LABELLED)


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
        return padded(part, width, IGNORED if name in ("labels", MARKS) else 0)

    return {name: [wide(name, part) for part in parts] for name, parts in columns.items()}


def by_token(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rows of tokens with a column for their text; rows of single examples unchanged.

    Tokens without a label are left out where there are labels or `token_marks`, and padding, whose
    probabilities are zeros, everywhere.

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
    elif MARKS in rows:
        counted &= _is_marked(rows[MARKS])
    if not bool(counted.any()):
        raise ValueError("no token has a label that counts: all are -100")
    flat = {name: column[counted] for name, column in rows.items()}
    return {**flat, TEXT: counted.nonzero(as_tuple=True)[0]}


def _is_marked(marks: Tensor) -> Tensor:
    """Return which tokens count by their marks; all where labels are no more than a filling."""
    is_filling = not bool((marks == LABELLED).any())
    if is_filling or bool((marks == UNLABELLED).any()):
        warn(
            "out-of-distribution texts have no labels of their tokens, so that all tokens count, "
            "special ones and further parts of words too, while of the data only those with a "
            "label do; the OOD metrics then tell kinds of tokens apart as well. Give these texts "
            "labels of -100 where a token is not to count, and any class elsewhere"
        )
    return torch.ones_like(marks, dtype=torch.bool) if is_filling else marks != IGNORED


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
