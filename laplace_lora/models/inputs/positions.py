"""`PositionRule`: who counts a decoder's positions where padding stands before a text.

Generation counts real tokens only. Some models do so by themselves, some count padding as well and
must be told, and some number positions in ways of their own (several dimensions for images, an
offset after padding). Which it is cannot be told from names, so it is tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import splits_by_example
from laplace_lora.models.changes.narrowing import last_true
from laplace_lora.models.changes.thread_hooks import hooks_suspended
from laplace_lora.models.tolerances import near

NEGLIGIBLE = 1e-4  # of the largest logit: rounding, not another position


def real_positions(mask: Tensor) -> Tensor:
    """Return positions that count real tokens only, ``(batch, tokens)``."""
    return ((mask != 0).cumsum(-1) - 1).clamp(min=0)


def holds_joined_texts(inputs: Mapping[str, Any]) -> bool:
    """Return whether rows hold several texts, told apart by positions that start anew.

    transformers keeps them apart only without a mask and without a cache.

    Args:
        inputs: What the model takes.
    """
    positions = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or not isinstance(positions, Tensor):
        return False
    return positions.ndim == 2 and bool((positions.diff() != 1).any())


class PositionRule:
    """Supplies ``position_ids`` where a model needs them.

    Where no text begins with padding they are left to the model. Otherwise the text with the most
    is run without it, and with it in both ways: that which gives the same logits is kept. Where
    neither does, as in decoders that count padding and take no positions, such batches are refused.

    Args:
        takes_positions: Whether the model has an argument ``position_ids``.
    """

    def __init__(self, takes_positions: bool) -> None:
        self._takes_positions = takes_positions
        self._supplies: bool | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PositionRule:
        """Return the rule itself: what one copy of a model finds out holds for all."""
        return self

    def apply(
        self,
        inputs: dict[str, Any],
        run: Callable[[dict[str, Any]], Tensor],
        dtype: Callable[[], torch.dtype],
        settles: bool,
    ) -> None:
        """Add ``position_ids`` to a model's inputs if it needs them.

        Args:
            inputs: The model's inputs, changed in place.
            run: From inputs to logits, ``(batch, tokens, vocabulary)``.
            dtype: Tells the coarsest in which the model computes; asked for only if it is tried.
            settles: Whether the model may be tried: it is in evaluation mode.

        Raises:
            ValueError: If padding before a text changes the model's logits.
        """
        mask = inputs.get("attention_mask")
        if "position_ids" in inputs or mask is None or mask.ndim != 2:
            return
        if bool((mask[:, 0] != 0).all()):
            return
        if self._supplies is None and settles:
            self._supplies = self._needs_positions(inputs, mask, run, dtype)
        if self._takes_positions and self._supplies is not False:
            inputs["position_ids"] = real_positions(mask)

    @torch.no_grad()
    def _needs_positions(
        self,
        inputs: Mapping[str, Any],
        mask: Tensor,
        run: Callable[[dict[str, Any]], Tensor],
        dtype: Callable[[], torch.dtype],
    ) -> bool | None:
        """Return whether a model must be told positions, ``None`` if that cannot be tried now."""
        if not splits_by_example(inputs, len(mask)):
            return False  # several images in one tensor: such models count by themselves
        starts = (mask != 0).to(torch.uint8).argmax(1)
        # The most padding shows the most.
        for n in starts.argsort(descending=True, stable=True)[: int((starts > 0).sum())].tolist():
            try:
                truth, *found = self._both_ways(inputs, mask, run, n)
                errors = [float((logits - truth).abs().max()) for logits in found]
                break
            except (IndexError, ValueError):  # its row of the images is another text's
                continue
            except RuntimeError:  # inside a transform of torch.func: no numbers to compare
                return None
        else:
            return None
        if not bool(torch.stack([truth, *found]).isfinite().all()):
            return None  # NaN is not far from anything
        tells = errors[-1] <= max(errors[0], NEGLIGIBLE * float(truth.abs().max()))
        if not near(found[-1 if tells else 0], truth, dtype()):
            share = min(errors) / float(truth.abs().max())
            raise ValueError(
                f"padding before a text changes the model's logits (by {share:.0e} of the largest):"
                " it counts padding as well and cannot be told positions; pad on the right, "
                "`tokenizer.padding_side = 'right'`, and generate, which pads on the left, from "
                "prompts of one length at a time"
            )
        return tells

    def _both_ways(
        self,
        inputs: Mapping[str, Any],
        mask: Tensor,
        run: Callable[[dict[str, Any]], Tensor],
        n: int,
    ) -> list[Tensor]:
        """Return a text's last logits without padding, with it, and with positions if it may."""
        single = {
            k: v[n : n + 1] if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()
        }
        real = mask[n] != 0
        bare = {
            key: value[:, real]
            if isinstance(value, Tensor)
            and value.shape[:2] == (1, len(real))
            and (value.ndim == 2 or key == "inputs_embeds")
            else value
            for key, value in single.items()
        }
        # From the end: the model may put tokens of its own before the text, as prompt tuning does.
        at = int(last_true(mask[n : n + 1])) - mask.shape[1]
        ways = [single]
        if self._takes_positions:
            ways.append({**single, "position_ids": real_positions(mask[n : n + 1])})
        with hooks_suspended():
            truth = run(bare)[0, -1].double()
            return [truth, *(run(way)[0, at].double() for way in ways)]
