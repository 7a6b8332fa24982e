"""`TangentCache`: keys and values of the tokens so far, and their tangents.

A transformers cache is an object with layers that hold tensors. `ForwardMode` takes and gives
tensors only, so the cache is put together inside every run, around buffers with spare columns: a
step writes its own columns and copies none of those before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.modes import coarsest_dtype
from laplace_lora.models.tolerances import near

NAMES = ("cache", "past_key_values")  # of the model's argument, and of what it returns
PLAIN = "DynamicCache"  # has no tensors beside its layers, as MiniMax's kind of it has
# Layers that only ever append to their keys and values, or drop old ones. Others (states of Mamba,
# quantised or static ones) write into their tensors in ways of their own.
APPENDING = ("DynamicLayer", "DynamicSlidingWindowLayer")
KINDS = ("keys", "values")
LEAST_ROOM = 64  # columns


@dataclass(frozen=True)
class TangentCache:
    """The cache of one batch of texts.

    Attributes:
        template: A transformers cache without keys and values.
        values: Its keys and values by name, ``(texts, heads, columns, d)`` each.
        tangents: Their tangents, ``(directions, texts, heads, columns, d)`` each.
        visible: First column that attention may see, by name, and the one after the last.
    """

    template: Any
    values: dict[str, Tensor]
    tangents: dict[str, Tensor]
    visible: dict[str, tuple[int, int]]

    @classmethod
    def after(
        cls, cache: Any, values: dict[str, Tensor], tangents: dict[str, Tensor]
    ) -> TangentCache:
        """Return what a first run left.

        Args:
            cache: The cache that the model returned, which knows how many tokens it has seen.
            values: Its `cached_tensors`.
            tangents: And their tangents.
        """
        visible = {name: (0, tensor.shape[-2]) for name, tensor in values.items()}
        return cls(_emptied(cache), values, tangents, visible)

    def with_room(self, columns: int, later: int) -> TangentCache:
        """Return a cache that can be appended to; this one is used up.

        Args:
            columns: How many will be appended now.
            later: How many are known to follow.
        """
        visible = dict(self.visible)
        for name, (start, end) in self.visible.items():
            if end + columns <= self.values[name].shape[-2]:
                continue
            held = end - start
            more = later or held // 8 + LEAST_ROOM
            window = _window(self.template, name)
            size = held + columns + (more if window is None else min(more, window))
            visible[name] = 0, held
            for tensors in (self.values, self.tangents):  # one by one, so that they exist once
                old = tensors.pop(name)
                grown = old.new_zeros(*old.shape[:-2], size, old.shape[-1])
                grown[..., :held, :] = old[..., start:end, :]
                tensors[name] = grown
                del old, grown
        return replace(self, visible=visible)

    def cache(self, tensors: dict[str, Tensor]) -> Any:
        """Return a cache around the buffers, for one run that appends to them in place.

        Args:
            tensors: The values, as the run sees them.
        """
        filled = _copied(self.template)
        for index in {name.split(".")[0] for name in tensors}:
            layer = filled.layers[int(index)]
            buffers = [tensors[f"{index}.{kind}"] for kind in KINDS]
            start, end = self.visible[f"{index}.keys"]
            layer.keys, layer.values = (buffer[..., start:end, :] for buffer in buffers)
            layer.update = _Appending(layer, buffers, start, end)
        return filled

    def appended(self, cache: Any, columns: int) -> TangentCache:
        """Return the cache after a run that has appended to it.

        Args:
            cache: The cache that the model returned.
            columns: How many were appended.
        """
        visible = {}
        for name, (start, end) in self.visible.items():
            window = _window(self.template, name)
            end += columns
            visible[name] = start if window is None else max(start, end - window), end
        return replace(self, template=_emptied(cache), visible=visible)

    def select(self, texts: Tensor) -> TangentCache:
        """Return the cache of some of the texts.

        Args:
            texts: Their indices.
        """
        values = {key: value[texts] for key, value in self.values.items()}
        tangents = {key: value[:, texts] for key, value in self.tangents.items()}
        return replace(self, values=values, tangents=tangents)


class _Appending:
    """What a layer of a transformers cache does with new keys and values, but in place.

    Args:
        layer: The layer.
        buffers: Of its keys and of its values.
        start: First column that attention may see.
        end: The one after the last.
    """

    def __init__(self, layer: Any, buffers: list[Tensor], start: int, end: int) -> None:
        self._layer, self._buffers, self._start, self._end = layer, buffers, start, end

    def __call__(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; return all keys and values that the new queries may see."""
        layer, end = self._layer, self._end + keys.shape[-2]
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[..., self._end : end, :].copy_(new)
        seen = [buffer[..., self._start : end, :] for buffer in self._buffers]
        window = _window_of(layer)
        if window is not None:
            layer.cumulative_length += keys.shape[-2]
            self._start = max(self._start, end - window)
        self._end = end
        layer.keys, layer.values = (buffer[..., self._start : end, :] for buffer in self._buffers)
        return seen[0], seen[1]


def cache_of(returned: Any) -> Any:
    """Return the cache in what a model returned, ``None`` if there is none."""
    found = (getattr(returned, name, None) for name in NAMES)
    return next((cache for cache in found if cache is not None), None)


def carries_tangents(cache: Any) -> bool:
    """Return whether a model's cache is one that can carry tangents: a plain attention cache."""
    layers = getattr(cache, "layers", None) or []
    plain = type(cache).__name__ == PLAIN and bool(layers)
    return plain and all(type(layer).__name__ in APPENDING for layer in layers)


def cached_tensors(cache: Any) -> dict[str, Tensor]:
    """Return the keys and values of a cache by name."""
    return {
        f"{index}.{kind}": getattr(layer, kind)
        for index, layer in enumerate(cache.layers)
        for kind in KINDS
        if getattr(layer, kind) is not None  # layers may share those of another
    }


@torch.no_grad()
def is_right_beside_padding(
    model: Any, text: Tensor, argument: str, others: Mapping[str, Tensor]
) -> bool:
    """Return whether a step from the cache is what the whole text gives.

    Models that count positions by themselves may do so otherwise with a cache: RoBERTa's decoders
    count real tokens without one, and padding as well with one.

    Args:
        model: A decoder.
        text: One token of padding and two others, ``(1, 3)``.
        argument: The name under which the model takes its cache.
        others: What else it takes of the text.
    """
    real = torch.tensor([[0, 1, 1]], device=text.device)
    with as_called():
        whole = model(input_ids=text, attention_mask=real, use_cache=False, **others)
        start = model(input_ids=text[:, :2], attention_mask=real[:, :2], use_cache=True, **others)
        cache = {argument: cache_of(start), "use_cache": True}
        step = model(input_ids=text[:, 2:], attention_mask=real, **cache, **others)
    return near(step.logits[:, -1], whole.logits[:, -1], coarsest_dtype(model))


def _window(cache: Any, name: str) -> int | None:
    return _window_of(cache.layers[int(name.split(".")[0])])


def _window_of(layer: Any) -> int | None:
    """Return how many columns a layer keeps, ``None`` if all."""
    return layer.sliding_window - 1 if layer.is_sliding else None


def _copied(cache: Any) -> Any:
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _emptied(cache: Any) -> Any:
    """Return a copy without tensors, which belong to one run and its derivatives."""
    emptied = _copied(cache)
    for layer in emptied.layers:
        layer.keys = layer.values = None
        vars(layer).pop("update", None)
    return emptied
