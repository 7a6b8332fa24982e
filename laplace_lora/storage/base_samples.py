"""Samples of a base model's weights, by which it is recognised in float16 as well.

A hash of values in bfloat16 is the same for a checkpoint in single precision and in bfloat16, but
not in float16: there values are rounded twice, and about one in sixteen ends a step apart.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_lora.storage.fingerprint import hashed, seen_parts

BASE_SAMPLES = "base_samples"
EVERY = 4  # of a tensor's values that are hashed one is kept
SMALLEST = 2.0**-24  # of float16; what is near zero is rounded to it or to zero
SHARE = 0.25  # of the values that may be a step apart; of other weights most are


class BaseSamples(NamedTuple):
    """Some values of a model's tensors.

    Attributes:
        others: Hash of names and shapes, and of quantised weights.
        values: In bfloat16, ``(values,)``.
        half: Which of them come from float16, ``(values,)``, 0 or 1.
    """

    others: str
    values: Tensor
    half: Tensor

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]]) -> BaseSamples:
        """Return samples of tensors.

        Args:
            tensors: Names and tensors, in order.
        """
        others, values, half = [], [torch.zeros(0)], [torch.zeros(0, dtype=torch.uint8)]
        for name, shape, seen, dtype in seen_parts(tensors):
            is_plain = seen.is_floating_point()
            others.append((name, shape, seen[:0] if is_plain else seen))
            if is_plain:
                values.append(seen[::EVERY].cpu())
                half.append(torch.full_like(values[-1], dtype == torch.float16).byte())
        return cls(hashed(others), torch.cat(values).to(torch.bfloat16), torch.cat(half))

    @classmethod
    def unpacked(cls, content: Mapping[str, Any]) -> BaseSamples:
        """Return the samples that `packed` has put into a file."""
        values, half = (
            torch.tensor(list(base64.b64decode(content[name])), dtype=torch.uint8)
            for name in ("values", "half")
        )
        values = values[: 2 * len(half)]
        return cls(content["others"], values.view(torch.bfloat16), half[: len(values) // 2])

    def packed(self) -> dict[str, str]:
        """Return what JSON can hold of them, about 60 bytes a tensor."""
        parts = {"values": self.values.view(torch.uint8), "half": self.half}
        texts = {k: base64.b64encode(bytes(v.tolist())).decode() for k, v in parts.items()}
        return {"others": self.others, **texts}

    def are_those_of(self, other: BaseSamples) -> bool:
        """Return whether values are another model's, but for the rounding of float16.

        Where both sides are in float16, or neither is, they must be equal.
        """
        if self.others != other.others or self.values.shape != other.values.shape:
            return False
        rounded = self.half != other.half
        steps = (_places(self.values) - _places(other.values)).abs()
        steps[(self.values.float() - other.values.float()).abs() <= SMALLEST * rounded] = 0
        if bool((steps > rounded).any()):
            return False
        return int(steps.sum()) <= SHARE * int(rounded.sum())


def _places(values: Tensor) -> Tensor:
    """Return integers in the order of numbers in bfloat16, next to each other where these are."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
