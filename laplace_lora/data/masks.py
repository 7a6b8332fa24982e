"""Find which tokens of a layer's input are real, by the attention masks of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from laplace_lora.data.batches import Batch

MASK_NAMES = ("attention_mask", "decoder_attention_mask")
INPUTS = ("input_ids", "inputs_embeds")
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
GLOBAL = "global_attention_mask"  # Longformer's, which says nothing of padding
UNCLEAR = ("mask", "masks", "attn_mask", "pad_mask")
# Masks and lengths of something else than padding
ELSEWHERE = (
    *("special_tokens", "assistant", "completion", "loss", "p_mask", "bool_masked_pos", "prompt"),
    *("head_mask", "attention_mask", "label", "target", "answer", "response", "tool", "cls"),
    "position",
)
Place: TypeAlias = Literal["encoder", "decoder"]  # at whose tokens a map stands
_INDICES = WeakTensorKeyDictionary()


def token_mask(
    batch: Batch | None, inputs: Tensor, name: str, place: Place | None = None
) -> Tensor | None:
    """Return which tokens of a map's input are real.

    At the encoder's tokens ``attention_mask`` says so, at the decoder's ``decoder_attention_mask``.
    Without the latter all of a batch's decoder tokens are real, as they are to the model; if the
    batch has none either, the model makes them of the encoder's.

    Args:
        batch: Mapping with the model's inputs and masks; any other batch has no padding.
        inputs: Input of the map, ``(batch, …, q)`` or ``(batch, q)``; a mask with more than two
            dimensions, as of several choices, has its last one for tokens.
        name: Name of the map, for error messages.
        place: At whose tokens the map stands; ``None`` if that is not known.

    Returns:
        The ``(batch, tokens)`` mask that fits the input, ``(rows,)`` where every token is a row;
        ``None`` if all tokens are real.

    Raises:
        ValueError: If there are masks, but none fits, or the place is not known and those of
            encoder and decoder fit and differ.
    """
    if not isinstance(batch, Mapping):
        return None
    masks = [mask.reshape(-1, mask.shape[-1]).to(inputs.device) for mask in _masks(batch, place)]
    others = {} if place == "decoder" else _masks_of_others(batch)
    if not masks and not others:
        _check_names(batch, inputs, name)
        return None
    if inputs.ndim > 2:
        inputs = inputs.flatten(1, -2)
        if inputs.shape[1] == 1:
            return None
    fitting = [rows.bool() for mask in masks if (rows := _of_rows(mask, inputs)) is not None]
    fitting_others = {
        key: rows.bool()
        for key, mask in others.items()
        if (rows := _of_rows(mask.to(inputs.device), inputs)) is not None
    }
    if any(not torch.equal(mask, fitting[0]) for mask in fitting[1:]):
        raise ValueError(
            f"layer {name!r} may stand at the encoder's tokens or at the decoder's, whose masks "
            f"differ and both have the shape {tuple(fitting[0].shape)}, so padding is unknown; pad "
            "the two to different lengths, or give the model `get_encoder` and `get_decoder`"
        )
    every = [*fitting, *fitting_others.values()]
    if any(not torch.equal(mask, every[0]) for mask in every):
        raise ValueError(
            f"layer {name!r} may stand at the tokens of several masks, {sorted(fitting_others)} "
            f"among them, which differ and have the shape {tuple(every[0].shape)}, so padding is "
            "unknown; pad to different lengths, or take a DiagLoraLaplace or FullLoraLaplace, "
            "which need no masks"
        )
    if every:
        return None if bool(every[0].all()) else every[0]
    if not masks or inputs.ndim == 2:  # or an example a row
        return None
    # Several experts see the one token of each text. Of longer texts without padding not as much
    # can be said: a layer may see something else of which some is padding, such as patches.
    if not others and all(mask.shape == (len(inputs), 1) and bool(mask.all()) for mask in masks):
        return None
    raise ValueError(
        f"layer {name!r} received {inputs.shape[1]} tokens per example, but the batch's "
        f"attention masks have the shapes {[tuple(mask.shape) for mask in masks]}, so padding "
        "is unknown"
    )


def _masks(batch: Mapping[str, Any], place: Place | None) -> list[Tensor]:
    """Return the masks of a batch that may be those of a place; none if all tokens are real."""
    encoder, decoder = (batch.get(name) for name in MASK_NAMES)
    decoder_text = _first(batch, DECODER_INPUTS)
    has_text = decoder is not None or decoder_text is not None
    if place == "encoder" or not has_text:
        return [] if encoder is None else [encoder]
    if place == "decoder" or (encoder is None and decoder is None):
        return [] if decoder is None else [decoder]
    pairs = ((encoder, _first(batch, INPUTS)), (decoder, decoder_text))
    either = [_all_real(text) if mask is None else mask for mask, text in pairs]
    return [mask for mask in either if mask is not None]


def _masks_of_others(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a batch's masks of what is no text, as of LUKE's entities or of image patches."""
    known = (*MASK_NAMES, GLOBAL)
    return {
        key: value
        for key, value in batch.items()
        if "attention_mask" in str(key) and key not in known
        if isinstance(value, Tensor) and value.ndim == 2
    }


def _check_names(batch: Mapping[str, Any], inputs: Tensor, name: str) -> None:
    """Refuse masks and lengths of a layer's tokens that do not say which of them are real.

    Some models' masks are true at real tokens, others', as torch's `MultiheadAttention` has them,
    at padding; and lengths do not say on which side padding is.
    """
    is_told = any(batch.get(known) is not None for known in MASK_NAMES)  # of another text's tokens
    for key, value in batch.items():
        if isinstance(value, Tensor) and _is_unclear(str(key), value, inputs, is_told):
            raise ValueError(
                f"{key!r} of the batch may say which tokens layer {name!r} shall count, but only "
                "'attention_mask', of ones at real tokens, is read; give the batch one, and let "
                "the model take it under this name"
            )


def _is_unclear(key: str, value: Tensor, inputs: Tensor, is_told: bool) -> bool:
    """Return whether an entry of a batch may tell a layer's tokens from padding, both of which are.

    Several texts may go through a layer in one call.
    """
    if key in UNCLEAR or key.endswith("padding_mask"):
        fits = value.shape == inputs.shape[:-1]
        return fits and not bool((value == value.flatten()[0]).all())
    if is_told or inputs.ndim < 3 or not value.numel() or any(part in key for part in ELSEWHERE):
        return False
    rows, tokens = inputs.shape[:-2].numel(), inputs.shape[-2]
    if "length" in key:
        counts = value.ndim == 1 and not value.is_floating_point() and rows % len(value) == 0
        return counts and bool((value <= tokens).all()) and bool((value < tokens).any())
    fits = value.ndim > 1 and value.shape[-1] == tokens and rows % value.shape[:-1].numel() == 0
    if "mask" not in key or not fits or not bool(((value == 0) | (value == 1)).all()):
        return False
    return not bool((value == value.flatten()[0]).all())


def text_shape(batch: Mapping[str, Any], mask_name: str) -> torch.Size | None:
    """Return the shape of the text that a mask is about, ``None`` if the batch does not have it.

    Args:
        batch: The model's inputs.
        mask_name: One of `MASK_NAMES`.

    Returns:
        ``(batch, tokens)``, or ``(batch, choices, tokens)``.
    """
    text = _first(batch, INPUTS if mask_name == MASK_NAMES[0] else DECODER_INPUTS)
    return _shape_of(text) if isinstance(text, Tensor) else None


def _first(batch: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    return next((batch[name] for name in names if batch.get(name) is not None), None)


def _all_real(text: Tensor | None) -> Tensor | None:
    """Return the mask with which a model reads a text, of ids or embeddings, that has none."""
    return None if text is None else torch.ones(_shape_of(text), dtype=torch.bool)


def _shape_of(text: Tensor) -> torch.Size:
    """Return the shape of a text's tokens, of which embeddings have several numbers each."""
    return text.shape[:-1] if text.is_floating_point() else text.shape


def _of_rows(mask: Tensor, inputs: Tensor) -> Tensor | None:
    """Return a mask for the rows of an input, ``None`` if it does not fit."""
    rows_are_tokens = mask.numel() == len(inputs) != len(mask)
    if inputs.ndim == 2:
        return mask.flatten() if rows_are_tokens else None
    if rows_are_tokens:  # each of them by several experts
        return mask.reshape(-1, 1).expand(inputs.shape[:2])
    return mask if mask.shape == inputs.shape[:2] else None


def real_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Return what stands at the real tokens, ``x[mask]``, ``(real tokens, …)``.

    Where they are is computed once for a mask: an accelerator waits to learn how many there are.

    Args:
        x: Values at tokens, ``(batch, tokens, …)``.
        mask: Real tokens, ``(batch, tokens)``.
    """
    if mask not in _INDICES:
        _INDICES[mask] = mask.flatten().nonzero().squeeze(1)
    return x.flatten(0, 1).index_select(0, _INDICES[mask])


def joined_masks(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Return the masks of several inputs, concatenated; ``None`` if all tokens are real."""
    if all(mask is None for _, mask in parts):
        return None
    if len(parts) == 1:
        return parts[0][1]
    real = [x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in parts]
    return torch.cat(real, dim=1)
