"""How long a fit takes, from some of its batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch.utils.data import DataLoader

from laplace_lora.posteriors.base import LoraLaplace

BATCHES = 10  # that are timed
LONGEST = 20.0  # seconds after which no further one begins, but for
FEWEST = 3  # the first and the last, which are not like the others, and one between them


@dataclass(frozen=True)
class FitTime:
    """How long a fit is expected to take, in seconds.

    Attributes:
        total: The fit.
        per_batch: A batch of it, of the usual size.
    """

    total: float
    per_batch: float


class Watched:
    """Some of a loader's batches, in their order and from all its parts, timed as they are read."""

    def __init__(self, loader: DataLoader[Any], batch_size: int) -> None:
        self.dataset: Any = loader.dataset  # a structure may ask how many examples will come
        self.rows: list[int] = []
        self.times: list[float] = []
        self._collate: Any = loader.collate_fn
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        count = -(-len(self.dataset) // self._batch_size)
        shown = min(count, BATCHES)
        for i in range(shown):
            first = i * (count - 1) // max(shown - 1, 1) * self._batch_size
            self.times.append(perf_counter())
            if i >= FEWEST and self.times[-1] - self.times[0] > LONGEST:
                self.times.pop()
                return
            examples = self.dataset[first : first + self._batch_size]
            self.rows.append(len(examples))
            yield self._collate(examples)


def fit_time(la: LoraLaplace, loader: DataLoader[Any], batch_size: int) -> FitTime:
    """Return how long a fit takes; fits a posterior to some batches.

    Between the reading of the second batch and that of the last lies all that grows with the data.
    What else there is (the first batch is verified, factors are decomposed) comes once.
    """
    examples: Any = loader.dataset
    # Whatever is loaded, compiled or allocated for the first batch is not for the others.
    warm_up = DataLoader(examples[:batch_size], batch_size, collate_fn=loader.collate_fn)
    la.fit(warm_up, progress_bar=False)
    watched: Any = Watched(loader, batch_size)
    start = perf_counter()
    la.fit(watched, progress_bar=False)
    elapsed = perf_counter() - start
    rows, times = watched.rows, watched.times
    if len(rows) < FEWEST:
        return FitTime(elapsed, elapsed / len(rows))
    steady = times[-1] - times[1]
    per_row = steady / sum(rows[1:-1])
    left = len(examples) - rows[0] - rows[-1]
    return FitTime(elapsed - steady + per_row * left, per_row * batch_size)


def tuning_time(la: LoraLaplace) -> str:
    """Return what the tuning after a fit takes, as a sentence."""
    if la.objective.jacobian_refusal is not None:
        return "Tuning then looks at 64 of the texts, and 2048 tokens, at most."
    return (
        "Tuning then takes as long again or longer: leave-one-out differentiates the rows, or at "
        "most 1000 of them, at the base model and at the adapter, by a backward pass for each "
        "class or output. Where it moves the posterior's mean, up to five passes over all rows "
        "follow."
    )
