"""Parts of the data that processes take for the whole: lists that each has cut to its own.

Nothing about such a list says so. So each process leaves a note of what it works on in the store of
the process group, and reads those that others have left there. Nobody waits, as a call may be one
process's alone; the last that comes to a call sees the notes of all.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from laplace_lora.data.draws import draws_kept
from laplace_lora.data.sharding import is_sharded_model
from laplace_lora.data.tally import fingerprints, named, raw

LOOKS = 8  # items of a note, and neighbours whose notes are read
WEIGHTS = 16  # of each tensor, by which models are told apart
READ_ANYWHERE = ("builtins", "datasets")  # others may open what workers must not inherit

_CALLS: Counter[str] = Counter()  # how often the program has come by a line


@contextmanager
def compared(loaders: Sequence[Any], model: nn.Module | None) -> Iterator[None]:
    """Refuse loaders of which each process has been given a part, before and after this block.

    Only calls from one line of the program are compared, on models with the same weights: others
    are work of their own.

    Args:
        loaders: Those that are not shared, with a length.
        model: What runs on them.

    Raises:
        ValueError: If another process has been given other data.
    """
    notes: list[Note] = []
    store = _store() if loaders else None
    if store is not None:
        notes = [Note(loader, model, store) for loader in loaders]
    for note in notes:
        note.compare()
    yield
    for note in notes:
        note.compare()


def _store() -> Any:
    """Return where processes leave notes for each other; ``None`` where the backend has none."""
    with suppress(AttributeError, KeyError, RuntimeError, ValueError):  # it is torch's own
        return dist.distributed_c10d._get_default_store()
    return None


class Note:
    """What a process works on, which others can read.

    Args:
        loader: The data.
        model: What runs on them.
        store: Where the note is left.
    """

    def __init__(self, loader: Any, model: nn.Module | None, store: Any) -> None:
        lines = (f"{f.f_code.co_filename}:{line}" for f, line in traceback.walk_stack(None))
        line = blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
        _CALLS[line] += 1
        self._key = f"laplace_lora/{line}/{_CALLS[line]}"
        self._loader, self._store, self._rank = loader, store, dist.get_rank()
        self._names, self._marks = _some_marks(loader)
        self._length, self._weights = _length(loader), _weights(model)
        content = (self._weights, self._length, self._names, self._marks)
        with suppress(RuntimeError):  # the process that kept the store has ended
            store.set(f"{self._key}/{self._rank}", json.dumps(content))

    def compare(self) -> None:
        """Read the notes that others have left so far.

        Raises:
            ValueError: If another process has been given other data.
        """
        count = dist.get_world_size()
        near = {(self._rank + step) % count for step in range(-LOOKS // 2, LOOKS // 2 + 1)}
        for other in sorted(near - {self._rank}):
            key, content = f"{self._key}/{other}", None
            with suppress(RuntimeError):
                content = self._store.get(key) if self._store.check([key]) else None
            if content is not None:
                self._check(other, *json.loads(content))

    def _check(
        self, other: int, weights: str, length: int | None, names: list[str], marks: list[int]
    ) -> None:
        if weights != self._weights:
            return
        if length != self._length and length is not None and self._length is not None:
            said = f"{self._length} and {length} examples"
        elif names == self._names and marks != self._marks and not self._has_any(marks):
            said = f"{len(marks)} examples of one of them are not among the other's"
        else:
            return
        raise ValueError(
            f"processes {self._rank} and {other} have been given different data, {said}, in "
            "loaders that do not deal them out, so each would take its part for the whole; give "
            "every process all the data (random choices by a fixed seed), and let a "
            "torch.utils.data.DistributedSampler deal them out, or none"
        )

    def _has_any(self, marks: list[int]) -> bool:
        """Return whether this process has any of some examples, or it cannot be told."""
        wanted, names = set(marks), set(self._names)
        if not (wanted and names):
            return True
        try:
            with draws_kept(devices=()):
                places = range(len(self._loader.dataset))
                return any(wanted & _marks(_numbers(self._loader, i), names) for i in places)
        except Exception:  # what a data set raises, the pass over it will, too
            return True


def _some_marks(loader: Any) -> tuple[list[str], list[int]]:
    """Return marks of some examples, and the names of the numbers that they are made of.

    Those that are drawn at random say nothing, so items are read twice.
    """
    try:
        data = loader.dataset
        kind = type(data).__module__.partition(".")[0]
        if getattr(loader, "num_workers", 0) and kind not in READ_ANYWHERE:
            return [], []
        places = range(0, len(data), max(len(data) // LOOKS, 1))[:LOOKS]
        with draws_kept(devices=()):
            first, again = ([_numbers(loader, i) for i in places] for _ in range(2))
    except Exception:  # what a data set raises, the pass over it will, too
        return [], []
    names = set.intersection(*(set(numbers) for numbers in first)) if first else set()
    for one, other in zip(first, again, strict=True):
        names = {name for name in names if name in other and one[name].equal(other[name])}
    if not names:
        return [], []
    return sorted(names), sorted(set().union(*(_marks(numbers, names) for numbers in first)))


def _numbers(loader: Any, place: int) -> dict[str, Tensor]:
    """Return the whole numbers of an item, as the model is given them; floats are rounded."""
    item = loader.dataset[place]
    batch = loader.collate_fn(item if loader.batch_sampler is None else [item])
    tensors = ((name.lstrip("/"), value) for name, value in named(batch, ""))
    return {
        name: value
        for name, value in tensors
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    }


def _marks(numbers: Mapping[str, Tensor], names: set[str]) -> set[int]:
    return set(fingerprints({name: numbers[name] for name in names}))


def _length(loader: Any) -> int | None:
    """Return how many examples a pass has, as far as a loader says; batches may be any number."""
    try:
        batches = loader.batch_sampler
        sampler: Any = batches.sampler if type(batches) is BatchSampler else loader.sampler
        return None if batches is None else min(len(loader.dataset), len(sampler))
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _weights(model: nn.Module | None) -> str:
    """Return a hash of what is trained; nothing of a model that processes run together."""
    digest = blake2b(digest_size=8)
    if model is not None and not is_sharded_model(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                digest.update(raw(parameter.flatten()[:WEIGHTS]))
    return digest.hexdigest()
