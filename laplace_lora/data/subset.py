"""`Subset`: some of a loader's examples, chosen by their places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from laplace_lora.data.batches import Batch, batch_length, some_examples

SEED = 0


class Subset:
    """A loader's batches with some of its examples left.

    Args:
        loader: Any loader.
        n_data: How many examples it has.
        count: How many are to be left, at random: the same in every pass over a loader that keeps
            its order.
        by_example: From a batch to the form in which every row is an example.
        divides: Whether every example of such a batch has its own row of each tensor.

    Attributes:
        seen: Examples that the latest pass came by.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        n_data: int,
        count: int,
        by_example: Callable[[Batch], Batch],
        divides: Callable[[Batch], bool],
    ) -> None:
        self.loader, self.by_example, self.divides = loader, by_example, divides
        source = torch.Generator().manual_seed(SEED)
        self.places = set(torch.randperm(n_data, generator=source)[:count].tolist())
        self.seen = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches with at least one of these examples.

        Raises:
            ValueError: If a batch must be divided whose tensors do not have one row per example.
        """
        self.seen = 0
        for batch in map(self.by_example, self.loader):
            size = batch_length(batch)
            rows = [row for row in range(size) if self.seen + row in self.places]
            self.seen += size
            if len(rows) == size:
                yield batch
            elif rows:
                if not self.divides(batch):
                    raise ValueError(
                        "some examples of a batch cannot be read without the others, as not every "
                        "tensor has one row for each (images in one tensor, for instance); give "
                        "batches of one example (batch_size=1)"
                    )
                yield some_examples(batch, rows)
