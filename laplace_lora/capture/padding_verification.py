"""Verify that padding does not count: an example's outputs with it and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.pairs import passes
from laplace_lora.display.warning import warn
from laplace_lora.models.changes.attention_types import TooShortError
from laplace_lora.models.inputs.unmasked import IDS, MASK, apparent_mask, check_is_masked
from laplace_lora.models.tolerances import distance, near


def is_padded(single: Any, config: Any) -> bool:
    """Return whether a text of one example is padded, or looks so where it has no mask."""
    texts = passes(single) if isinstance(single, Mapping) else []
    masks = [apparent_mask(text, config) for text in texts]
    return any(mask is not None and not bool(mask.all()) for mask in masks)


def verify_padding(
    own: Callable[[Any], Tensor | None],
    single: Any,
    output: Tensor,
    dtype: torch.dtype,
    config: Any,
) -> None:
    """Compare the outputs of an example with those of its texts without padding.

    Costs a forward pass of one example. Of several choices the one with the most padding is
    compared.

    Args:
        own: From a batch to the transformer's own outputs; ``None`` where it cannot tell.
        single: A batch of one example.
        output: The model's outputs for it, ``(1, outputs)``, or a row for each of its tokens.
        dtype: The coarsest in which the model computes.
        config: The transformer's configuration, which tells padding where there is no mask.

    Warns if they differ and a mask says what is padding.

    Raises:
        ValueError: If they differ and none does.
    """
    if not is_padded(single, config):
        return
    texts = passes(single)
    for text, padded in zip(texts, output.chunk(len(texts), dim=-1), strict=True):
        mask = apparent_mask(text, config)
        if mask is None or bool(mask.all()) or not bool(mask.any()) or len(mask) != 1:
            continue
        bare, columns = _bare(text, mask)
        try:
            answer = None if bare is None else own(bare)
        except TooShortError:
            continue  # the text has no answer of its own
        if answer is None:
            continue
        if columns is not None and answer.shape == padded.shape:
            answer, padded = answer[:, columns], padded[:, columns]
        elif answer.shape != padded.shape and MASK in text:
            padded = _at_text(padded, mask)
        if near(answer, padded, dtype):
            continue
        check_is_masked(text, config, "the model reads it as text, and numbers depend on it")
        warn(
            "the model itself answers a padded text otherwise than the text alone "
            f"({distance(answer, padded)}), so numbers depend on the batch size. Models with "
            "learnt positions, and encoder-decoders that find answers in a text, count padding "
            "before it: pad on the right, or give the batches `position_ids` if the model takes "
            "them. Classifiers with prompts before the text, or given `inputs_embeds`, read the "
            "last token of all: pad on the left. Models that pool tokens, such as Funnel, count "
            "padding on either side: give them batches of texts of one length"
        )
        return


def without_padding(batch: Any) -> Any:
    """Return a batch of one example without its padding, where it has a mask.

    What an encoder-decoder's decoder reads stays as it is.
    """
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != 1:
        return batch
    return _cut(batch, mask.shape, lambda value: value[:, mask[0].bool()])


def _bare(text: Mapping[str, Any], mask: Tensor) -> tuple[dict[str, Any] | None, slice | None]:
    """Return a text without its padding, ``None`` where it cannot be cut.

    Of choices, the one with the most padding in the place of all, so that there are as many; and
    which of the outputs is its own.
    """
    if mask.ndim == 2:
        real = mask[0].bool()
        return _cut(text, mask.shape, lambda value: value[:, real]), None
    if mask.ndim != 3 or getattr(text.get(IDS), "shape", None) != mask.shape:
        return None, None
    lengths = (mask[0] != 0).sum(-1)
    n = int(lengths.masked_fill(lengths == 0, mask.shape[-1]).argmin())  # a choice may be missing
    chosen, real = [n] * mask.shape[1], mask[0, n].bool()
    bare = _cut(text, mask.shape, lambda value: value[:, chosen][:, :, real])
    positions = text.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2:  # which all choices share
        bare["position_ids"] = positions[:, real]
    return bare, slice(n, n + 1)


def _at_text(output: Tensor, mask: Tensor) -> Tensor:
    """Return the outputs at text, where each token has one as start and one as end of an answer."""
    if output.shape != (1, 2 * mask.shape[-1]):
        return output
    at_text: Tensor = output.unflatten(-1, (2, -1))[..., mask[0].bool()].flatten(-2)
    return at_text


def _cut(
    batch: Mapping[str, Any], shape: torch.Size, cut: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Return a batch with what has an entry for each token cut; a decoder's text is another one."""
    return {
        key: cut(value)
        if isinstance(value, Tensor)
        and not key.startswith(("decoder_", "pixel_"))
        and value.shape[: len(shape)] == shape
        else value
        for key, value in batch.items()
    }
