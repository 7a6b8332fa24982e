"""Parts of the data that processes take for the whole: lists that each has cut to its own.

Nothing about such a list says so. So each process leaves a note of what it works on in the store of
the process group, and reads those that others have left there. Nobody waits, as a call may be one
process's alone; the last that comes to a call sees the notes of all. What is found is no more than
likely, as processes may mean to work on data of their own: hence a warning.
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
from torch.utils.data import BatchSampler, Subset, TensorDataset

from laplace_lora.data.draws import draws_kept
from laplace_lora.data.sharding import is_sharded_model
from laplace_lora.data.tally import fingerprints, named, number_of, raw
from laplace_lora.display.warning import warn

LOOKS = 8  # items of a note, and neighbours whose notes are read
WEIGHTS = 16  # of each tensor, by which models are told apart

_CALLS: Counter[str] = Counter()  # how often the program has come by a line


@contextmanager
def compared(loaders: Sequence[Any], model: nn.Module | None) -> Iterator[None]:
    """Warn of loaders of which each process has been given a part, before and after this block.

    Only calls from one line of the program are compared, on models with the same weights: others
    are work of their own.

    Args:
        loaders: Those that are not shared, with a length.
        model: What runs on them; without one nothing is compared.

    Warns:
        UserWarning: If another process has been given other data.
    """
    notes: list[Note] = []
    if loaders and model is not None and (store := _store()) is not None:
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

    def __init__(self, loader: Any, model: nn.Module, store: Any) -> None:
        lines = (f"{f.f_code.co_filename}:{line}" for f, line in traceback.walk_stack(None))
        line = blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
        _CALLS[line] += 1
        self._key = f"laplace_lora/{line}/{_CALLS[line]}"
        self._loader, self._store, self._rank = loader, store, dist.get_rank()
        self._has_warned = False
        self._data = _readable(loader)
        self._names, self._marks = _some_marks(self._data, loader)
        self._length, self._weights = _length(loader), _weights(model)
        content = (self._weights, self._length, self._names, self._marks)
        with suppress(RuntimeError):  # the process that kept the store has ended
            store.set(f"{self._key}/{self._rank}", json.dumps(content))

    def compare(self) -> None:
        """Read the notes that others have left so far; warn once if they have other data."""
        count = dist.get_world_size()
        near = {(self._rank + step) % count for step in range(-LOOKS // 2, LOOKS // 2 + 1)}
        for other in sorted(near - {self._rank}):
            key, content = f"{self._key}/{other}", None
            with suppress(RuntimeError):
                content = self._store.get(key) if self._store.check([key]) else None
            said = None if content is None else self._difference(*json.loads(content))
            if said is not None and not self._has_warned:
                self._has_warned = True
                warn(
                    f"processes {self._rank} and {other} have been given different data, {said}, "
                    "in loaders that do not deal them out, and each takes its own for the whole. "
                    "If they are to share the work, give every process all the data (random "
                    "choices by a fixed seed), and let a torch.utils.data.DistributedSampler deal "
                    "them out, or none"
                )

    def _difference(
        self, weights: str, length: int | None, names: list[str], marks: list[int]
    ) -> str | None:
        """Return in what another's data differ, ``None`` if they need not."""
        if weights != self._weights:
            return None
        if length != self._length and length is not None and self._length is not None:
            return f"{self._length} and {length} examples"
        if names == self._names and marks != self._marks and not self._has_any(marks):
            return f"{len(marks)} examples of one of them are not among the other's"
        return None

    def _has_any(self, marks: list[int]) -> bool:
        """Return whether this process has any of some examples, or it cannot be told."""
        wanted, names = set(marks), set(self._names)
        if not (wanted and names):
            return True
        try:
            with draws_kept(devices=()):
                places = range(len(self._data))
                contents = (_content(self._data, i) for i in places)
                return any(wanted & _marks(self._loader, each, names) for each in contents)
        except Exception:  # what a data set raises, the pass over it will, too
            return True


def _readable(loader: Any) -> Any:
    """Return the data if reading an item does nothing else; ``None`` for other classes.

    Those of one's own may open files that workers must not inherit, or draw random numbers.
    """
    data = whole = getattr(loader, "dataset", None)
    while isinstance(whole, Subset):
        whole = whole.dataset
    is_list = type(whole) in (list, tuple, TensorDataset)
    return data if is_list or type(whole).__module__.partition(".")[0] == "datasets" else None


def _some_marks(data: Any, loader: Any) -> tuple[list[str], list[int]]:
    """Return marks of some examples, and the names of what they are made of.

    What is drawn at random says nothing, so items are read twice.
    """
    if data is None:
        return [], []
    try:
        places = range(0, len(data), max(len(data) // LOOKS, 1))[:LOOKS]
        with draws_kept(devices=()):
            first, again = ([_content(data, i) for i in places] for _ in range(2))
    except Exception:  # what a data set raises, the pass over it will, too
        return [], []
    names = set.intersection(*(set(content) for content in first)) if first else set()
    for one, other in zip(first, again, strict=True):
        names = {name for name in names if name in other and raw(one[name]) == raw(other[name])}
    if not names:
        return [], []
    return sorted(names), sorted(set().union(*(_marks(loader, each, names) for each in first)))


def _content(data: Any, place: int) -> dict[str, Any]:
    """Return what is in an item, by name; without floats in tensors, which are rounded."""
    return {
        name: value
        for name, value in named(data[place], "")
        if not (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()))
    }


def _marks(loader: Any, content: Mapping[str, Any], names: set[str]) -> set[int]:
    """Return a mark of an item, or those of a ready-made batch's examples."""
    if loader.batch_sampler is None:
        return set(fingerprints({name.lstrip("/"): content[name] for name in names}))
    return {number_of((name, content[name]) for name in sorted(names))}


def _length(loader: Any) -> int | None:
    """Return how many examples a pass has, as far as a loader says; batches may be any number."""
    try:
        batches = loader.batch_sampler
        sampler: Any = batches.sampler if isinstance(batches, BatchSampler) else loader.sampler
        return None if batches is None else min(len(loader.dataset), len(sampler))
    except Exception:  # no sampler must have a length
        return None


def _weights(model: nn.Module) -> str:
    """Return a hash of what is trained, or of all; nothing of a model that processes share."""
    digest = blake2b(digest_size=8)
    if not is_sharded_model(model):
        parameters = list(model.parameters())
        for parameter in [p for p in parameters if p.requires_grad] or parameters:
            digest.update(raw(parameter.flatten()[:WEIGHTS]))
    return digest.hexdigest()
