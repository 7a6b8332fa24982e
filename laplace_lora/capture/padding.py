"""`Padding`: which tokens of a recorded pass are real, and cleaning what stands at the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.maps import Call
from laplace_lora.data.batches import Batch
from laplace_lora.data.masks import Place, token_mask
from laplace_lora.data.pairs import passes


class Padding:
    """The attention masks of a batch, for the inputs and gradients of its layers.

    Args:
        batch: The batch, in which attention masks are looked up.
        model: The model that runs, which knows what its frames are made of, see `frame_masks`.
        of_layer: From a layer's name to where its masks are looked up instead.

    Attributes:
        batch: The same.
        texts: Number of texts per example.
    """

    def __init__(
        self,
        batch: Batch,
        model: object,
        of_layer: Callable[[str], Mapping[str, Any]] | None,
    ) -> None:
        self.batch = batch
        self._of_layer = of_layer
        self._by_layer: dict[str, dict[str, Any]] = {}
        self._model = model
        self._sources = passes(batch) if of_layer is None else [{}]
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
            name: Name of the layer.
            place: At whose tokens it stands in this call, see `Places`.

        Raises:
            ValueError: If it is not known which tokens are real, see `token_mask`.
        """
        source = call * len(self._sources) // calls
        masks = self._sources[source]
        own: tuple[tuple[str, int], ...] = ()
        if self._of_layer is not None:
            if name not in self._by_layer:  # which keeps them, so that no other gets their numbers
                self._by_layer[name] = dict(self._of_layer(name))
            masks = self._by_layer[name]
            own = tuple((key, id(value)) for key, value in masks.items())
        key = (source, own, x.shape[:-1], x.device, place)
        if key not in self._masks:
            self._masks[key] = self._of_tokens(masks, x, name, place)
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

    def cleaned(
        self, call: int, calls: int, values: Tensor, name: str, place: Place | None
    ) -> Tensor:
        """Return values at tokens, with zeros for what is not finite at padding.

        Attention may leave anything there, as nobody uses it; times a gradient of zero it would be
        no number.

        Args:
            call: As for `mask`.
            calls: As for `mask`.
            values: An input or an output gradient, ``(batch, tokens, d)``; others are returned
                unchanged.
            name: As for `mask`.
            place: As for `mask`.
        """
        mask = self._padded(call, calls, values, name, place)
        if mask is None:
            return values
        # An accelerator would have to wait for the answer, so there it is not asked.
        if values.device.type == "cpu" and bool(values.sum().isfinite()):
            return values
        return values.masked_fill(~mask.unsqueeze(-1) & ~values.isfinite(), 0)

    def cleaned_calls(self, by_map: list[list[Call]], names: Sequence[str]) -> list[list[Call]]:
        """Return the calls of layers with cleaned inputs; layers that share one still share it."""
        padded = {
            id(call.x): call.x.detach()
            for name, calls in zip(names, by_map, strict=True)
            for k, call in enumerate(calls)
            if call.args
            and isinstance(call.x, Tensor)
            and self._padded(k, len(calls), call.x, name, call.place) is not None
        }
        if not padded:
            return by_map
        device = next(iter(padded.values())).device
        sums = torch.stack([x.sum().float().to(device) for x in padded.values()])
        bad = {key for key, ok in zip(padded, sums.isfinite().tolist(), strict=True) if not ok}
        cleaned: dict[int, Tensor] = {}

        def clean(index: int, calls: int, call: Call, name: str) -> Call:
            if not call.args or id(call.x) not in bad:
                return call
            if id(call.x) not in cleaned:
                x = call.x.detach()
                cleaned[id(call.x)] = self.cleaned(index, calls, x, name, call.place)
            return call._replace(args=(cleaned[id(call.x)], *call.args[1:]))

        return [
            [clean(k, len(calls), call, name) for k, call in enumerate(calls)]
            for name, calls in zip(names, by_map, strict=True)
        ]

    def _padded(
        self, call: int, calls: int, values: Tensor, name: str, place: Place | None
    ) -> Tensor | None:
        """Return the mask of values at tokens; ``None`` if no padding is there, or known of."""
        if values.ndim < 2 or not values.is_floating_point():
            return None
        try:
            return self.mask(call, calls, values, name, place)
        except ValueError:
            return None


def frame_masks(model: object) -> Callable[[Tensor], Tensor] | None:
    """Return what turns a mask of samples into one of frames; ``None`` for other models.

    The model is asked itself: Wav2Vec2 and its kin (HuBERT, WavLM, SEW, Data2Vec) say how many
    frames samples make.

    Returns:
        From ``(batch, samples)`` to ``(batch, frames)``.
    """
    if not isinstance(model, nn.Module):
        return None
    for module in model.modules():
        lengths: Any = getattr(module, "_get_feat_extract_output_lengths", None)
        masks: Any = getattr(module, "_get_feature_vector_attention_mask", None)
        if callable(lengths) and callable(masks):
            return lambda mask: masks(int(lengths(mask.shape[1])), mask)
    return None
