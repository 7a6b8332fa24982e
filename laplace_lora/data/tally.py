"""Fingerprints of examples: whether what workers and processes read are parts of a stream.

Nothing about a stream says whether its workers and processes divide it among them. What they yield
does: a sample of its examples, chosen by their fingerprints alone (the smallest ones, as in a
bottom-k sketch), is the same in whatever order they come, and so is how often each of them came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import combinations
from typing import Any

from torch import Tensor, uint8

from laplace_lora.data.batches import Batch, batch_length, splits_by_example
from laplace_lora.data.masks import MASK_NAMES, text_shape

KEPT = 256  # examples of a sample
FEW = 8  # examples that are not the same by chance
SAME = 0.9  # of a sample: shuffled workers drop other examples at their ends

Sample = frozenset[tuple[int, int]]  # fingerprints, and how often each came


class Tally:
    """A sample of the examples that came by, and how often each of them came.

    Attributes:
        counts: From an example's fingerprint to how often it came.
    """

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self._bound = 2**64

    def add(self, fingerprints: Iterable[int]) -> None:
        """Take in examples."""
        for number in fingerprints:
            if number < self._bound:
                self.counts[number] = self.counts.get(number, 0) + 1
        if len(self.counts) > 2 * KEPT:
            kept = sorted(self.counts)[:KEPT]
            # A smaller one that comes later has not come before.
            self.counts = {number: self.counts[number] for number in kept}
            self._bound = kept[-1] + 1

    @property
    def sample(self) -> Sample:
        """The examples with the smallest fingerprints, and how often each came."""
        return frozenset((number, self.counts[number]) for number in sorted(self.counts)[:KEPT])

    def came_by_each(self, workers: int) -> bool:
        """Return whether nearly every example came as often as there are workers, or twice that."""
        counts = [count for _, count in self.sample]
        return bool(counts) and sum(c % workers == 0 for c in counts) >= SAME * len(counts)


def counted_once(
    batches: Iterable[Batch], workers: int, report: Callable[[Sample], None] = lambda _: None
) -> Iterator[Batch]:
    """Yield the batches of a stream, and check that its workers have divided it among them.

    Args:
        batches: From a loader over a stream.
        workers: How many workers the loader has.
        report: Called with a sample of the examples when all have been read.

    Raises:
        ValueError: If every worker reads the whole stream; where all read it in the same order,
            before the second round.
    """
    tally = Tally()
    for index, batch in enumerate(batches):
        tally.add(fingerprints(batch))
        # Batches come from the workers in turn.
        if index + 1 == workers and len(tally.counts) >= FEW:
            _check_divided(tally, workers)
        yield batch
    _check_divided(tally, workers)
    report(tally.sample)


def check_apart(samples: Sequence[Sequence[Sample | None]]) -> None:
    """Check that processes have read different examples of streams.

    Args:
        samples: Of every process, one of each pass; ``None`` for a pass that ended early, or whose
            loader says whose its examples are.

    Raises:
        ValueError: If two have read the same.
    """
    for passes in zip(*samples, strict=True):
        for (i, a), (j, b) in combinations(enumerate(passes), 2):
            if a and b and len(a & b) >= SAME * max(len(a), len(b)):
                raise ValueError(
                    f"processes {i} and {j} read the same examples of the stream in different "
                    "orders, so they would count twice; give each process its own part "
                    "(datasets.distributed.split_dataset_by_node, or by rank in the data set's "
                    "__iter__), or all processes the same examples in the same order (a fixed seed)"
                )


def _check_divided(tally: Tally, workers: int) -> None:
    if workers > 1 and tally.came_by_each(workers):
        raise ValueError(
            f"each of the loader's {workers} workers reads the whole stream, so every example came "
            f"{workers} times; let the data set's __iter__ divide its examples by "
            "torch.utils.data.get_worker_info(), or use num_workers=0"
        )


def fingerprints(batch: Batch) -> list[int]:
    """Return a number of 64 bits for each example, which its padding does not change.

    A batch whose tensors do not have one row per example counts as one.
    """
    parts = list(named(batch, ""))
    if not splits_by_example(batch):
        return [number_of(parts)]
    size = batch_length(batch)
    digests = [blake2b(digest_size=8) for _ in range(size)]
    by_name = batch if isinstance(batch, Mapping) else {}
    masks = {
        name: by_name[name].detach().cpu().bool() for name in MASK_NAMES if _marks(by_name, name)
    }
    for name, value in parts:
        if isinstance(value, Tensor) and value.ndim:
            value = value.detach().cpu()
            mask = _mask_of(name, value, masks)
            rows: Sequence[Any] = list(value) if mask is None else _unpadded(value, mask)
        elif isinstance(value, list | tuple) and len(value) == size:
            rows = value
        else:
            continue
        for digest, row in zip(digests, rows, strict=True):
            digest.update(name.encode() + raw(row))
    return [int.from_bytes(digest.digest(), "big") for digest in digests]


def number_of(parts: Iterable[tuple[str, Any]]) -> int:
    """Return a number of 64 bits for what has these parts, by name."""
    digest = blake2b(digest_size=8)
    for name, value in parts:
        digest.update(name.encode() + raw(value))
    return int.from_bytes(digest.digest(), "big")


def _mask_of(name: str, value: Tensor, masks: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mask of a value's tokens; a decoder's text has its own, or none."""
    is_decoders = name.rpartition("/")[2].startswith("decoder_")
    allowed = MASK_NAMES[1:] if is_decoders else MASK_NAMES
    fitting = (masks[key] for key in allowed if key in masks)
    return next((mask for mask in fitting if mask.shape == value.shape[: mask.ndim]), None)


def _marks(batch: Mapping[str, Any], name: str) -> bool:
    """Return whether a batch has a mask of this name, and it marks tokens, not pairs of them."""
    mask = batch.get(name)
    return isinstance(mask, Tensor) and (mask.ndim == 2 or mask.shape == text_shape(batch, name))


def _unpadded(value: Tensor, mask: Tensor) -> list[Any]:
    """Return what each example has at its real tokens; of several choices with their lengths."""
    rows: list[Any] = [row[real] for row, real in zip(value, mask, strict=True)]
    if mask.ndim == 2:
        return rows
    # Without these a token could be the last of one choice or the first of the next.
    lengths = mask.sum(-1).flatten(1).tolist()
    return [f"{raw(row)!r} {choices}" for row, choices in zip(rows, lengths, strict=True)]


def named(batch: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a batch, and what else it has, by name."""
    if isinstance(batch, Mapping):
        for key in sorted(batch, key=str):
            yield from named(batch[key], f"{name}/{key}")
    elif isinstance(batch, list | tuple) and any(isinstance(part, Tensor) for part in batch):
        for i, part in enumerate(batch):
            yield from named(part, f"{name}/{i}")
    else:
        yield name, batch


def raw(value: Any) -> bytes:
    """Return the content of a tensor, or of anything else as it is printed."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes()
    return repr(value).encode()
