"""`Reading`: texts read from left to right, with their logits' tangents.

Every token goes through the network once: keys, values and their tangents are kept, so a token
costs the same at any length, but for the attention to those before it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.peft_state import starts_at_tokens
from laplace_lora.generation.late_head import LateHead
from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.inputs.positions import holds_joined_texts, real_positions
from laplace_lora.models.inputs.rotary import angles_change_at, check_lengths
from laplace_lora.models.logits_model import wide
from laplace_lora.models.tangents.forward_mode import ForwardMode
from laplace_lora.models.tangents.tangent_cache import (
    NAMES,
    TangentCache,
    cache_of,
    cached_tensors,
    carries_tangents,
    is_right_beside_padding,
)
from laplace_lora.models.token_model import TokenModel

logger = logging.getLogger(__name__)

PIECE = 128  # tokens read at once: attention's tangents grow with their square
ROOM = 2**27  # numbers: tangents of the logits that are in memory at once


def columns_at_once(directions: int, texts: int, vocabulary: int) -> int:
    """Return at how many tokens of each text the logits' tangents are in memory at once."""
    return min(PIECE, max(1, ROOM // (directions * texts * vocabulary)))


class Reading:
    """A batch of texts that is being read.

    Args:
        model: The language model, in evaluation mode.
        forward: Its twin, which carries the directions.
        inputs: The first tokens: ``input_ids``, and whatever else the model takes.
        cached: Whether keys and values are kept. They are not if the model's cache is no plain
            attention cache, the model puts tokens of its own before those it is given, as prompt
            tuning does, or a prefix in the place of a cache, as prefix tuning with transformers
            before 5.24, its adapter must see the whole text, as Activated LoRA, rows hold joined
            texts, images stand beside them, or padding stands before a text and cached steps count
            it; then every reading goes over the whole text again.
    """

    def __init__(
        self,
        model: TokenModel,
        forward: ForwardMode,
        inputs: Mapping[str, Any],
        cached: bool = True,
    ) -> None:
        self._model, self._forward = model, forward
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self._ids = ids[:, :0]
        self._mask = ids[:, :0]
        self._waiting = ids, torch.ones_like(ids) if mask is None else mask
        self._width = ids.shape[1]
        self._others = {
            key: value
            for key, value in inputs.items()
            if key not in ("input_ids", "attention_mask", "labels")
        }
        model.check_reads_forward(self._numbers_of(0))
        self._are_joined = holds_joined_texts(inputs)
        self._counts = model.needs_positions(inputs)
        self._turn = angles_change_at(model.config)
        self._at_once = columns_at_once(
            forward.n_directions, len(ids), int(model.vocabulary_size or 1)
        )
        self._cache: TangentCache | None = None
        self._before, is_plain = self._tried(ids)
        sees_all = self._are_joined or self._has_images() or starts_at_tokens(forward.model)
        # PEFT puts its prefixes in the place of any `past_key_values`; since 5.24 it is `cache`.
        if is_plain and model.has_prompt and self._cache_argument() == "past_key_values":
            sees_all = True
        self._cached = cached and is_plain and not sees_all and self._caches_padding()

    def logits(self, columns: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Read the waiting tokens.

        Args:
            columns: Of which tokens the logits are wanted, ascending.

        Yields:
            Some of the columns, ``(k,)``, the logits there, ``(texts, k, vocabulary)``, and their
            tangents, ``(directions, texts, k, vocabulary)``.
        """
        ids, mask = self._waiting
        start = self._ids.shape[1]
        while ids.shape[1]:
            length = self._piece_length(columns - start, ids.shape[1])
            if self._turn is not None and start < self._turn:
                length = min(length, self._turn - start)
            elif start == self._turn:
                self._cache = None  # it has the angles of shorter texts: all is read anew
            self._ids = torch.cat([self._ids, ids[:, :length]], dim=1)
            self._mask = torch.cat([self._mask, mask[:, :length]], dim=1)
            ids, mask = ids[:, length:], mask[:, length:]
            chosen = columns[(columns >= start) & (columns < start + length)]
            start += length
            if self._cache is not None:
                self._cache = self._cache.with_room(length, ids.shape[1])
            computed = len(chosen) if self._model.accepts("logits_to_keep") else length
            if len(chosen) and computed > self._at_once and not self._cached:
                yield from self._run_in_parts(chosen)
            elif len(chosen):
                yield chosen, *self._run(length, chosen)
            else:  # the cache needs the pass
                self._run(length, torch.tensor([start - 1], device=chosen.device))
        self._waiting = ids, mask

    def last_logits(self) -> tuple[Tensor, Tensor]:
        """Read the waiting tokens; return logits after the last, and their tangents.

        Returns:
            ``(texts, vocabulary)`` and ``(directions, texts, vocabulary)``.
        """
        last = self._ids.shape[1] + self._waiting[0].shape[1] - 1
        columns = torch.tensor([last], device=self._ids.device)
        ((_, logits, tangents),) = list(self.logits(columns))
        return logits[:, 0], tangents[:, :, 0]

    def append(self, tokens: Tensor) -> None:
        """Let a token of each text wait to be read, ``(texts,)``."""
        column = tokens.unsqueeze(1)
        self._waiting = column, torch.ones_like(column)

    def keep(self, texts: Tensor) -> None:
        """Go on with some of the texts only, given by their indices."""
        if len(texts) == len(self._ids):
            return
        self._ids, self._mask = self._ids[texts], self._mask[texts]
        self._waiting = self._waiting[0][texts], self._waiting[1][texts]
        self._others = {
            key: value[texts] if isinstance(value, Tensor) and value.ndim else value
            for key, value in self._others.items()
        }
        self._cache = None if self._cache is None else self._cache.select(texts)

    def _has_images(self) -> bool:
        """Return whether there are inputs whose parts are not those of the tokens."""
        whole = (len(self._ids), self._width)
        others = (value for value in self._others.values() if isinstance(value, Tensor))
        return any(value.ndim > 1 and value.shape[:2] != whole for value in others)

    def _piece_length(self, columns: Tensor, waiting: int) -> int:
        if not self._cached:
            return waiting
        ahead = columns[columns >= 0]
        limit = int(ahead[self._at_once]) if len(ahead) > self._at_once else waiting
        return min(limit, waiting, PIECE)

    def _run(self, length: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network over the last tokens, or all, and return logits and tangents."""
        width = self._ids.shape[1]
        first = 0 if self._cache is None else width - length
        columns = columns - first + self._before
        arguments = self._arguments(first)
        narrowed = self._model.accepts("logits_to_keep")
        if narrowed:
            arguments["logits_to_keep"] = columns
        left: Any = None
        cache = self._cache

        def read(returned: Any) -> dict[str, Tensor]:
            nonlocal left
            logits = returned.logits
            found = {"logits": wide(logits if narrowed else logits[:, columns])}
            if self._cached:
                left = cache_of(returned)
                found.update(cached_tensors(left) if cache is None else {})
            return found

        with self._model.refusing_long_texts(width), as_called():
            if cache is None:
                values, tangents = self._forward.run(arguments, read)
            else:
                earlier = cache
                argument = self._cache_argument()
                values, tangents = self._forward.run(
                    arguments,
                    read,
                    lambda tensors: {argument: earlier.cache(tensors)},
                    cache.values,
                    cache.tangents,
                )
        logits = values.pop("logits"), tangents.pop("logits")
        if self._cached and cache is None:
            self._cache = TangentCache.after(left, values, tangents)
        elif cache is not None:
            self._cache = cache.appended(left, length)
        return logits

    def _run_in_parts(self, columns: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run the network over all tokens, and the head over some of the columns at a time."""
        width = self._ids.shape[1]
        alone: dict[str, Any] = {"input_ids": self._ids[:1, :1], **self._numbers_of(0)}
        if self._model.accepts("use_cache"):
            alone["use_cache"] = False
        arguments, at = self._arguments(0), columns + self._before
        with self._model.refusing_long_texts(width):
            head = LateHead(self._forward, arguments, alone, at, self._before + width)
        if not head.is_right:
            yield columns, *self._run(width, columns)
            return
        for first in range(0, len(columns), self._at_once):
            part = slice(first, first + self._at_once)
            yield columns[part], *head.logits(part)

    def _arguments(self, first: int) -> dict[str, Any]:
        """Return the tokens from one on, and what else the model takes beside them."""
        whole = (len(self._ids), self._width)
        arguments: dict[str, Any] = {"input_ids": self._ids[:, first:]}
        for key, value in self._others.items():
            if isinstance(value, Tensor) and value.shape[:2] == whole:
                value = value[:, first : self._ids.shape[1]]
            arguments[key] = value
        if not self._are_joined:
            arguments["attention_mask"] = self._mask
        check_lengths(self._model.config, arguments)
        if self._model.accepts("use_cache"):
            arguments["use_cache"] = self._cached
        if self._counts:
            arguments["position_ids"] = real_positions(self._mask)[:, first:]
        return arguments

    def _numbers_of(self, text: int) -> dict[str, Tensor]:
        """Return what the model takes of one text in a single number, as the task it is of."""
        return {
            key: value[text : text + 1]
            for key, value in self._others.items()
            if isinstance(value, Tensor) and value.shape == (len(self._ids),)
        }

    def _caches_padding(self) -> bool:
        """Return whether a step from the cache is right where padding stands before a text."""
        ids, mask = self._waiting
        first, n = map(int, (mask != 0).to(torch.uint8).argmax(1).max(0))
        if self._counts or not first:
            return True
        text = ids[n : n + 1, [first - 1, first, min(first + 1, ids.shape[1] - 1)]]
        is_right = is_right_beside_padding(
            self._forward.model, text, self._cache_argument(), self._numbers_of(n)
        )
        if not is_right:
            logger.info("the model's cached steps count padding: every token reads the text anew")
        return is_right

    def _cache_argument(self) -> str:
        """Return the name under which the model takes its cache."""
        return next(name for name in NAMES if self._model.accepts(name))

    def _tried(self, ids: Tensor) -> tuple[int, bool]:
        """Return how many tokens the model puts before a text, and whether it can be cached."""
        arguments = {"use_cache": True} if self._model.accepts("use_cache") else {}
        with torch.no_grad(), as_called():
            returned = self._forward.model(
                input_ids=ids[:1, :1], **self._numbers_of(0), **arguments
            )
        before = returned.logits.shape[1] - 1
        plain = bool(arguments) and carries_tangents(cache_of(returned))
        if before:
            logger.info("the model puts a prompt before a text: every token reads both anew")
        elif arguments and not plain:
            logger.info(
                "the model's cache is no plain attention cache: every token reads the text anew"
            )
        return before, plain and not before
