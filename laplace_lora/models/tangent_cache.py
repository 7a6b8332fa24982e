"""`TangentCache`: keys and values of the tokens so far, and their tangents.

A transformers cache is an object with layers that hold tensors. `ForwardMode` takes and gives
tensors only, so a cache is taken apart after every run and put together inside the next one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

Self = TypeVar("Self", bound="TangentCache")


NAMES = ("cache", "past_key_values")  # of the model's argument, and of what it returns
# Layers that only ever append to their keys and values, or drop old ones. Others (states of Mamba,
# quantised or static ones) write into their tensors, which tangents cannot follow.
APPENDING = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True)
class TangentCache:
    """The cache of one batch of texts.

    Attributes:
        template: A transformers cache without keys and values.
        values: Its keys and values by name, ``(texts, …)`` each.
        tangents: Their tangents, ``(directions, texts, …)`` each.
    """

    template: Any
    values: dict[str, Tensor]
    tangents: dict[str, Tensor]

    @classmethod
    def after(
        cls: type[Self], cache: Any, values: dict[str, Tensor], tangents: dict[str, Tensor]
    ) -> Self:
        """Return what a run left.

        Args:
            cache: The cache that the model returned, which knows how many tokens it has seen.
            values: Its `tensors`.
            tangents: And their tangents.
        """
        return cls(_filled(cache, dict.fromkeys(values)), values, tangents)

    def cache(self, tensors: dict[str, Tensor]) -> Any:
        """Return a cache around tensors; the run that uses it changes neither them nor this one."""
        return _filled(self.template, tensors)

    def select(self: Self, texts: Tensor) -> Self:
        """Return the cache of some of the texts.

        Args:
            texts: Their indices.
        """
        values = {key: value[texts] for key, value in self.values.items()}
        tangents = {key: value[:, texts] for key, value in self.tangents.items()}
        return replace(self, values=values, tangents=tangents)


def cache_of(returned: Any) -> Any:
    """Return the cache in what a model returned, ``None`` if there is none."""
    found = (getattr(returned, name, None) for name in NAMES)
    return next((cache for cache in found if cache is not None), None)


def carries_tangents(cache: Any) -> bool:
    """Return whether a model's cache is one that can carry tangents: a plain attention cache."""
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer).__name__ in APPENDING for layer in layers)


def cached_tensors(cache: Any) -> dict[str, Tensor]:
    """Return the keys and values of a cache by name."""
    return {
        f"{index}.{name}": getattr(layer, name)
        for index, layer in enumerate(cache.layers)
        for name in ("keys", "values")
        if getattr(layer, name) is not None  # layers may share those of another
    }


def _filled(cache: Any, tensors: Mapping[str, Tensor | None]) -> Any:
    filled = copy.copy(cache)
    filled.layers = [copy.copy(layer) for layer in cache.layers]
    for key, tensor in tensors.items():
        index, name = key.split(".")
        setattr(filled.layers[int(index)], name, tensor)
    return filled
