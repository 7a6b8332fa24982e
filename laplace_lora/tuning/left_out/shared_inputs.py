"""Training examples that say the same: what leaving one of them out must leave out as well.

A text that comes twice, or that is part of several preference pairs, has its label or its rank seen
elsewhere. Left out alone it is predicted far too well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import on_cpu, one_example
from laplace_lora.data.distributed import Together
from laplace_lora.data.pairs import passes, plain_name
from laplace_lora.data.shared_tensors import with_own_rows
from laplace_lora.data.tally import fingerprints

SIGN = 2**63  # of integers of 64 bits

Key = tuple[int, ...]  # fingerprints of an example's inputs


class SharedInputs:
    """Fingerprints of the inputs that came by, batch by batch.

    Args:
        label_key: Key of the labels, which are no input.
        columns_read: From the names of columns to those that the model may read; it reads all by
            default. The numbers of rows, say, tell copies apart and change no prediction.
        keep_pairs: Whether to keep the inputs of preference pairs, which may share one text of two.

    Attributes:
        is_known: Whether all batches have tensors with a row for each example, or one for all.
        keys: What each example is told by, once `companions` has been asked for.
    """

    def __init__(
        self,
        label_key: str,
        columns_read: Callable[[Iterable[str]], set[str]] = set,
        keep_pairs: bool = False,
    ) -> None:
        self.label_key = label_key
        self.columns_read = columns_read
        self.keep_pairs = keep_pairs
        self.is_known = True
        self.keys: list[Key] = []
        self._numbers: list[Tensor] = []
        self._kept: dict[Key, Any] = {}

    def add(self, x: Any, y: Tensor) -> None:
        """Add a batch: what the model takes, and its labels."""
        if isinstance(x, Mapping):
            x = with_own_rows(self._read_of(x), len(y))
        numbers = [fingerprints(part) for part in passes(x)]
        if any(len(part) != len(y) for part in numbers):  # rows are no examples
            self.is_known = False
            return
        columns = [torch.tensor([n - SIGN for n in part], device=y.device) for part in numbers]
        self._numbers.append(torch.stack(columns, 1))
        if self.keep_pairs and len(columns) > 1:
            local = on_cpu(x)
            for n, key in enumerate(self._numbers[-1].tolist()):
                self._kept.setdefault(tuple(key), one_example(local, n))

    def companions(self, team: Together) -> dict[int, list[int]]:
        """Return the examples that share an input with others: by place, itself and those others.

        Args:
            team: The processes that share the data.
        """
        self.is_known = all(team.all_of(self.is_known))
        if not self.is_known:
            return {}
        numbers = team.rows(numbers=self._numbers)["numbers"].tolist()
        self.keys = [tuple(row) for row in numbers]
        places: dict[int, list[int]] = defaultdict(list)
        for i, row in enumerate(numbers):
            for number in set(row):
                places[number].append(i)
        found = {}
        for i, row in enumerate(numbers):
            others = {j for number in row for j in places[number]} - {i}
            if others:
                found[i] = sorted({i, *others})
        return found

    def contradicted(self, labels: Tensor) -> int:
        """Return how many examples have an input that comes with another label as well.

        Args:
            labels: Of the examples of all processes, once `companions` has been asked for.
        """
        met: dict[Key, set[str]] = defaultdict(set)
        for key, label in zip(self.keys, labels.tolist(), strict=False):
            met[key].add(str(label))
        return sum(len(met[key]) > 1 for key in self.keys)

    def _read_of(self, x: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model reads of a batch, under the batch's names."""
        names = {name: plain_name(name) for name in x if name != self.label_key}
        read = self.columns_read(names.values())
        return {name: x[name] for name, plain in names.items() if plain in read}

    def inputs_of(self, keys: Sequence[Key], team: Together) -> dict[Key, Any]:
        """Return the inputs of pairs, as batches of one on the CPU, whichever process saw them.

        Args:
            keys: What they are told by; all processes ask for the same ones.
            team: The processes that share the data.
        """
        found: dict[Key, Any] = {}
        for part in team.all_of({key: self._kept[key] for key in keys if key in self._kept}):
            found |= part
        return found


def standard_error(values: Tensor, companions: Mapping[int, Sequence[int]] | None = None) -> float:
    """Return the standard error of a mean, in which companions are no independent examples.

    Not a number of a single example, which does not say how far others would differ.

    Args:
        values: One of each example, ``(examples,)``.
        companions: See `SharedInputs.companions`.
    """
    n = len(values)
    if n < 2:
        return math.nan
    deviations = values - values.mean()
    related = deviations.clone()
    for owner, members in (companions or {}).items():
        related[owner] = deviations[list(members)].sum()
    squares = max(float(deviations @ related), float(deviations @ deviations))
    return math.sqrt(squares / (n * (n - 1)))
