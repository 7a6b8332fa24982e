"""Preference pairs: batches in which an example is two texts, of which one was chosen.

A reward model runs on each text of a pair. Its two rewards are the outputs of one example,
``[rejected, chosen]``, and their softmax is the Bradley-Terry likelihood ``P(chosen ≻ rejected) =
σ(r_chosen − r_rejected)``: label 1 says that the chosen text wins. What a reward is belongs to
`models`, predictions to `predictive`.

Source: Bradley and Terry (1952), *Rank analysis of incomplete block designs*; the names in a batch
are those of TRL's ``RewardTrainer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

REWARD_MODELING = "reward_modeling"
SUFFIXES = ("_rejected", "_chosen")  # in the order of the outputs
OF_TRAINING = ("margin", "return_loss")  # what TRL's collators add, which no model takes


def is_pair(batch: Any) -> bool:
    """Return whether a batch holds pairs: a mapping with names that end in one of the suffixes."""
    return isinstance(batch, Mapping) and any(str(name).endswith(SUFFIXES) for name in batch)


def passes(batch: Any) -> list[Any]:
    """Return the batches that a model runs on for one batch.

    Args:
        batch: Pairs, with ``input_ids_chosen``, ``input_ids_rejected`` and the like, each padded
            to a length of its own; or any other batch.

    Returns:
        The rejected and the chosen texts of pairs, under the names that a model knows; names
        without a suffix go to both. The batch itself if it holds no pairs.

    Raises:
        ValueError: If a half lacks what the other has, or is of another size.
    """
    if not is_pair(batch):
        return [batch]
    common = {k: v for k, v in batch.items() if not k.endswith(SUFFIXES) and k not in OF_TRAINING}
    halves = [
        {k.removesuffix(suffix): v for k, v in batch.items() if k.endswith(suffix)}
        for suffix in SUFFIXES
    ]
    for half, suffix, other in zip(halves, SUFFIXES, reversed(halves), strict=True):
        missing = sorted(f"{name}{suffix}" for name in other.keys() - half.keys())
        if missing:
            raise ValueError(f"a batch of pairs lacks {missing}; it has {sorted(batch)}")
    sizes = [[len(v) for v in half.values() if isinstance(v, Tensor)] for half in halves]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"a batch of pairs has {sizes[1]} chosen, but {sizes[0]} rejected rows; give as many "
            "of each, in the same order"
        )
    return [{**common, **half} for half in halves]


def as_pairs(batch: Any, label: str) -> Any:
    """Return a batch with one row a pair, and a label each.

    Args:
        batch: Pairs in a mapping, or in a pair of such a mapping and labels. Without suffixes and
            labels it is taken for TRL's newer form: the chosen texts, then as many rejected ones.
        label: Name of the labels, 1 where the chosen text wins and 0 where the rejected one does.
            Where there are none, the chosen text wins.

    Returns:
        A mapping with suffixes and labels.

    Raises:
        TypeError: If the batch is no such thing.
        ValueError: If it holds single texts or margins, or labels are others than 0 and 1.
    """
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[0], Mapping):
        batch = {**batch[0], label: batch[1]}
    if not isinstance(batch, Mapping):
        raise TypeError(
            "a reward model is fitted on mappings with 'input_ids_chosen' and "
            f"'input_ids_rejected', got {type(batch).__name__}"
        )
    if bool(torch.as_tensor(batch.get("margin", 0)).any()):
        raise ValueError("the likelihood knows no margins; remove 'margin' from the batches")
    pairs = dict(batch) if is_pair(batch) else _halved(batch, label)
    rows = [len(v) for k, v in pairs.items() if k.endswith(SUFFIXES) and isinstance(v, Tensor)]
    size = rows[0] if rows else 0
    y = torch.as_tensor(pairs.get(label, torch.ones(size, dtype=torch.long)))
    if y.shape != (size,) or bool(((y != 0) & (y != 1)).any()):
        raise ValueError(
            f"labels of {size} pairs must be {size} values, 1 where the chosen text wins and 0 "
            f"where the rejected one does; got {y.tolist()}"
        )
    return {**pairs, label: y.long()}


def _halved(batch: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Split texts that stand one after the other, first the chosen and then the rejected ones."""
    rows = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)
    if label in batch or not rows or rows % 2:
        raise ValueError(
            "a reward model is fitted on pairs: names that end in '_chosen' and '_rejected', or "
            f"unlabelled rows of which the first half was chosen; got {rows} rows of "
            f"{sorted(batch)}"
        )
    pairs = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == rows:
            pairs[f"{name}_chosen"], pairs[f"{name}_rejected"] = value.chunk(2)
        else:
            pairs[name] = value
    return pairs
