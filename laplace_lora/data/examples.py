"""`Examples`: which rows of a layer's input belong to an example, where each has several.

The choices of a multiple-choice model, the windows of an image or the tokens of a text may be rows
of their own by the time a layer sees them. They are an example's if they stand together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from torch import Tensor

from laplace_lora.data.batches import splits_by_example
from laplace_lora.data.shared_tensors import without_shared

IMAGE_DIMS = 4  # (batch, channels, height, width)


class Examples:
    """The examples of a batch, for the inputs and gradients of its layers.

    An example has ``k`` rows if ``k`` is the product of the first dimensions of one of its inputs:
    choices, or choices times tokens. Of images alone it may be any number. Elsewhere numbers of
    rows may depend on the data, as those of the tokens that are routed to an expert, and such rows
    must not be dealt out by their number.

    Args:
        count: How many there are.
        sources: What the model is called with, see `passes`.

    Attributes:
        count: The same.
    """

    def __init__(self, count: int, sources: Sequence[Any] = ()) -> None:
        self.count = count
        self._widths: set[int] = set()
        self._are_images = False
        sources = [without_shared(source, count) for source in sources]
        if all(splits_by_example(source, count) for source in sources):
            shapes = [x.shape for source in sources for x in _inputs(source) if x.ndim > 1]
            self._widths = {width for shape in shapes for width in accumulate(shape[1:], mul)}
            self._are_images = bool(shapes) and all(len(shape) >= IMAGE_DIMS for shape in shapes)

    def have(self, x: Tensor) -> bool:
        """Return whether every example has the same number of a tensor's rows."""
        rows, left = divmod(len(x), self.count) if self.count else (0, 1)
        return not left and (rows == 1 or rows in self._widths or (rows > 0 and self._are_images))

    def are_rows_of(self, x: Tensor) -> bool:
        """Return whether every row of a tensor is an example."""
        return len(x) == self.count

    def folded(self, x: Tensor) -> Tensor:
        """Return rows as tokens of their examples.

        Args:
            x: ``(rows, …, d)``.

        Returns:
            Shape ``(examples, tokens, d)``; this and ``(examples, d)`` are returned unchanged.
        """
        if x.ndim in (2, 3) and self.are_rows_of(x):
            return x
        return x.reshape(self.count, -1, x.shape[-1])

    def folded_mask(self, mask: Tensor) -> Tensor:
        """Return ``(rows, …)`` marks of tokens as ``(examples, tokens)``."""
        # The same object where nothing changes: where padding lies is remembered by it.
        same = mask.ndim == 2 and len(mask) == self.count
        return mask if same else mask.reshape(self.count, -1)

    def summed(self, x: Tensor) -> Tensor:
        """Return the sums over the rows of each example, ``(examples, d)``, of ``(rows, d)``."""
        return x if self.are_rows_of(x) else x.reshape(self.count, -1, x.shape[-1]).sum(1)


def _inputs(source: Any) -> Iterator[Tensor]:
    """Yield the tensors of what a model is called with, but for labels."""
    if isinstance(source, Tensor):
        yield source
    elif isinstance(source, Mapping):
        yield from (v for k, v in source.items() if k != "labels" and isinstance(v, Tensor))
