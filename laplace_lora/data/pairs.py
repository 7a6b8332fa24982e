"""Preference pairs: batches whose examples are two texts each, one of them chosen.

A reward model runs on each text of a pair. Its two rewards are the outputs of one example,
``[rejected, chosen]``, and their softmax is the Bradley-Terry likelihood ``P(chosen ≻ rejected) =
σ(r_chosen − r_rejected)``: label 1 means that the chosen text wins.

Source: Bradley and Terry (1952), *Rank analysis of incomplete block designs*; the names in a batch
are those of TRL's ``RewardTrainer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import Batch

SUFFIXES = ("_rejected", "_chosen")  # in the order of the outputs
TRAINING_ONLY = ("margin", "return_loss")  # added by TRL's collators; no model takes them


def is_pair(batch: Batch) -> bool:
    """Return whether a batch holds pairs: a mapping with keys that end in one of the suffixes."""
    return isinstance(batch, Mapping) and any(str(name).endswith(SUFFIXES) for name in batch)


def plain_name(name: str) -> str:
    """Return the name under which a model reads one text of the pairs, without its suffix."""
    suffix = next((suffix for suffix in SUFFIXES if str(name).endswith(suffix)), "")
    return name.removesuffix(suffix) if suffix else name


def is_stacked(batch: Batch) -> bool:
    """Return whether a batch holds pairs in laplace-torch's form, ``(pairs, 2, tokens)``."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return isinstance(ids, Tensor) and ids.ndim == 3 and ids.shape[1] == 2


def check_not_stacked(batch: Batch) -> None:
    """Refuse stacked pairs, which are neither single texts nor pairs with suffixes.

    Raises:
        ValueError: If a batch holds such pairs.
    """
    if isinstance(batch, Mapping) and is_stacked(batch):
        raise ValueError(
            f"'input_ids' of the batch has the shape {tuple(batch['input_ids'].shape)}: predict "
            "pairs as laplace_lora.data.pairs.as_pairs(batch), which takes stacked ones apart"
        )


def passes(batch: Batch) -> list[Any]:
    """Return the inputs of the forward passes that one batch needs.

    Args:
        batch: Pairs, with ``input_ids_chosen``, ``input_ids_rejected`` and the like, each padded
            separately; or any other batch.

    Returns:
        For pairs the rejected and the chosen texts, under the names that a model knows; entries
        without a suffix go to both. Otherwise the batch itself.

    Raises:
        ValueError: If one text of the pairs lacks what the other has, or their numbers differ.
    """
    if not isinstance(batch, Mapping) or not is_pair(batch):
        return [batch]
    shared = {k: v for k, v in batch.items() if not k.endswith(SUFFIXES) and k not in TRAINING_ONLY}
    halves = [
        {k.removesuffix(suffix): v for k, v in batch.items() if k.endswith(suffix)}
        for suffix in SUFFIXES
    ]
    for half, suffix, other in zip(halves, SUFFIXES, reversed(halves), strict=True):
        missing = sorted(f"{name}{suffix}" for name in other.keys() - half.keys())
        if missing:
            raise ValueError(f"a batch of pairs lacks {missing}; it has {sorted(batch)}")
    sizes = [[len(v) for v in half.values() if isinstance(v, Tensor) and v.ndim] for half in halves]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"a batch of pairs has {sizes[1]} chosen, but {sizes[0]} rejected rows; give as many "
            "of each, in the same order"
        )
    return [{**shared, **half} for half in halves]


def as_pairs(batch: Batch, label: str = "labels") -> dict[str, Any]:
    """Return a batch with one row and one label per pair.

    This is how every call reads a batch that is about pairs: fits, tuning, calibration,
    `reward_difference`, and predictions with ``fitting=True``. Where pairs and single texts are
    both answered, in ``la(batch)`` and ``la.predict(batch)``, a batch without suffixes holds single
    texts; give it through this function for pairs.

    Args:
        batch: Pairs in a mapping, or a tuple of such a mapping and labels. Without suffixes,
            ``input_ids`` of shape ``(pairs, 2, tokens)`` with labels are laplace-torch's form: the
            label says which of the two wins. Otherwise, without labels, it is read as TRL's newer
            form: the chosen texts, then as many rejected ones.
        label: Key of the labels, 1 where the chosen text wins and 0 where the rejected one does.
            Without labels the chosen text wins.

    Returns:
        A mapping with suffixes and labels.

    Raises:
        TypeError: If the batch has neither form.
        ValueError: If it holds single texts or margins, labels other than 0 and 1, or pairs in
            laplace-torch's form without labels.
    """
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[0], Mapping):
        batch = {**batch[0], label: batch[1]}
    if not isinstance(batch, Mapping):
        raise TypeError(
            "a reward model is fitted on mappings with 'input_ids_chosen' and "
            f"'input_ids_rejected', got {type(batch).__name__}"
        )
    if bool(torch.as_tensor(batch.get("margin", 0)).any()):
        raise ValueError("the likelihood has no margins; remove 'margin' from the batches")
    if is_pair(batch):
        pairs = dict(batch)
    elif is_stacked(batch):
        pairs = _unstacked(batch, label)
    else:
        pairs = _halved(batch, label)
    tensors = [v for k, v in pairs.items() if k.endswith(SUFFIXES) and isinstance(v, Tensor)]
    size = next((len(v) for v in tensors if v.ndim), 0)
    y = torch.as_tensor(pairs.get(label, torch.ones(size, dtype=torch.long)))
    if y.shape != (size,) or bool(((y != 0) & (y != 1)).any()):
        raise ValueError(
            f"labels of {size} pairs must be {size} values, 1 where the chosen text wins and 0 "
            f"where the rejected one does; got {y.tolist()}"
        )
    return {**pairs, label: y.long()}


def _unstacked(batch: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Take apart pairs whose texts stand in the second dimension, in the order of the outputs."""
    if label not in batch:
        raise ValueError(
            f"pairs stacked as {tuple(batch['input_ids'].shape)} need {label!r}: 1 where the "
            "second text wins, 0 where the first one does"
        )
    pairs: dict[str, Any] = {}
    for name, value in batch.items():
        is_paired = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == 2
        if is_paired and name != label:
            pairs |= {f"{name}{suffix}": value[:, i] for i, suffix in enumerate(SUFFIXES)}
        else:
            pairs[name] = value
    return pairs


def _halved(batch: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Split a batch whose first half are the chosen and whose second half the rejected texts."""
    rows = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)
    if label in batch or not rows or rows % 2:
        raise ValueError(
            "pairs are needed here: keys that end in '_chosen' and '_rejected', or "
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
