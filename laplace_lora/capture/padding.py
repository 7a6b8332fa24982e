"""`Padding`: which tokens of a recorded pass are real, and cleaning what stands at the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Call
from laplace_lora.data.batches import Batch
from laplace_lora.data.masks import Place, token_mask
from laplace_lora.data.pairs import passes
from laplace_lora.models.inputs.frames import frame_masks


class Padding:
    """The attention masks of a batch, for the inputs and gradients of its layers.

    Args:
        batch: Where attention masks are looked up.
        model: The model that runs, which knows what its frames are made of, see `frame_masks`.

    Attributes:
        batch: The same.
        texts: Number of texts per example.
    """

    def __init__(self, batch: Batch, model: object) -> None:
        self.batch = batch
        self._model = model
        self._sources = passes(batch)
        self.texts = len(self._sources)
        self._masks: dict[Any, Tensor | None] = {}

    def mask(
        self, call: int, calls: int, x: Tensor, name: str, place: Place | None
    ) -> Tensor | None:
        """Return which tokens of a layer's input are real; ``None`` if all are.

        Args:
            call: Index of the layer's call.
            calls: Number of its calls, which are shared equally by the texts.
            x: Input as the layer gets it, see `token_mask`.
            name: Name of the layer, for error messages.
            place: At whose tokens it stands in this call, see `Places`.

        Raises:
            ValueError: If it is not known which tokens are real, see `token_mask`.
        """
        source = call * len(self._sources) // calls
        key = (source, x.shape[:-1], x.device, place)
        if key not in self._masks:
            self._masks[key] = self._of_tokens(self._sources[source], x, name, place)
        return self._masks[key]

    def _of_tokens(self, source: Batch, x: Tensor, name: str, place: Place | None) -> Tensor | None:
        try:
            return token_mask(source, x, name, place)
        except ValueError:
            assert isinstance(source, Mapping)
            mask, frames = source.get("attention_mask"), frame_masks(self._model)
            if frames is None or mask is None or mask.ndim != 2 or place == "decoder":
                raise
            return token_mask({"attention_mask": frames(mask)}, x, name)

    def cleaned(self, call: int, calls: int, values: Tensor, place: Place | None) -> Tensor:
        """Return values at tokens, with zeros for what is not finite at padding.

        Attention may leave anything there, as nobody uses it; times a gradient of zero it would be
        no number.

        Args:
            call: As for `mask`.
            calls: As for `mask`.
            values: An input or an output gradient, ``(batch, tokens, d)``; others are returned
                unchanged.
            place: As for `mask`.
        """
        mask = self._padded(call, calls, values, place)
        if mask is None:
            return values
        # An accelerator would have to wait for the answer, so there it is not asked.
        if values.device.type == "cpu" and bool(values.sum().isfinite()):
            return values
        return values.masked_fill(~mask.unsqueeze(-1) & ~values.isfinite(), 0)

    def cleaned_calls(self, by_map: list[list[Call]]) -> list[list[Call]]:
        """Return the calls of layers with cleaned inputs; layers that share one still share it."""
        padded = {
            id(call.x): call.x.detach()
            for calls in by_map
            for k, call in enumerate(calls)
            if call.args
            and isinstance(call.x, Tensor)
            and self._padded(k, len(calls), call.x, call.place) is not None
        }
        if not padded:
            return by_map
        device = next(iter(padded.values())).device
        sums = torch.stack([x.sum().float().to(device) for x in padded.values()])
        bad = {key for key, ok in zip(padded, sums.isfinite().tolist(), strict=True) if not ok}
        cleaned: dict[int, Tensor] = {}

        def clean(index: int, calls: int, call: Call) -> Call:
            if not call.args or id(call.x) not in bad:
                return call
            if id(call.x) not in cleaned:
                cleaned[id(call.x)] = self.cleaned(index, calls, call.x.detach(), call.place)
            return call._replace(args=(cleaned[id(call.x)], *call.args[1:]))

        return [[clean(k, len(calls), call) for k, call in enumerate(calls)] for calls in by_map]

    def _padded(self, call: int, calls: int, values: Tensor, place: Place | None) -> Tensor | None:
        """Return the mask of values at tokens; ``None`` if no padding is there, or known of."""
        if values.ndim < 2 or not values.is_floating_point():
            return None
        try:
            return self.mask(call, calls, values, "", place)
        except ValueError:
            return None
