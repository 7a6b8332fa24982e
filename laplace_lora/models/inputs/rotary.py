"""Models that read a text otherwise where a batch is long: what that does to shorter texts in it.

The angles of some rotary embeddings belong to a whole pass, whatever the length of each text in it.
``longrope`` (Phi-3.5, Phi-4) has two sets of them, for passes up to a length and beyond; those of
``dynamic`` grow with the longest text so far and stay for the next one. Llama 4 scales queries by
positions that count padding. All of them read texts below a length like any other model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from laplace_lora.models.inputs.configs import text_config

ANGLES = "inv_freq"  # how the names of such buffers end


def angles_change_at(config: Any) -> int | None:
    """Return up to how many tokens a pass has other angles than a longer one; ``None`` if never.

    Args:
        config: A transformer's configuration, or anything else.
    """
    return _limit(text_config(config), "longrope")


def check_lengths(config: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse batches in which the length of one text, or its padding, changes another's logits.

    Args:
        config: The transformer's configuration, or anything else.
        inputs: What it is called with.

    Raises:
        ValueError: If it is such a batch.
    """
    config = text_config(config)
    limits = {kind: _limit(config, kind) for kind in ("longrope", "dynamic")}
    scaled_at = _scaled_at(config)
    if scaled_at is None and not any(limits.values()):
        return
    given = inputs.get("attention_mask")
    mask = given if isinstance(given, Tensor) and given.ndim == 2 else None
    text = inputs.get("input_ids", inputs.get("inputs_embeds")) if mask is None else mask
    if not isinstance(text, Tensor) or text.ndim < 2:
        return
    width = text.shape[1]  # of the cached tokens, too
    positions = inputs.get("position_ids")
    reach = int(positions.max()) + 1 if isinstance(positions, Tensor) else width
    limit = limits["dynamic"]
    if limit is not None and reach > limit:
        raise ValueError(
            f"the batch has {reach} tokens, and beyond {limit} the model's rotary angles (dynamic) "
            "depend on the longest text that it has read before, so its logits are no function of "
            f"a text alone; truncate the texts to {limit} tokens"
        )
    limit = limits["longrope"]
    if limit and mask is not None and reach > limit >= (shortest := int(mask.sum(1).min())):
        raise ValueError(
            f"a text of {shortest} tokens stands in a batch of {reach}, and beyond {limit} the "
            "model has other rotary angles (longrope) for the whole batch; give texts up to "
            f"{limit} tokens and longer ones batches of their own, and generate from prompts of "
            "one length at a time"
        )
    if scaled_at and mask is not None and width >= scaled_at and not bool(mask[:, 0].all()):
        raise ValueError(
            f"the batch has {width} tokens and padding before a text, and from {scaled_at} on the "
            "model's attention depends on how many stand before a token, padding included "
            "(attn_temperature_tuning); pad on the right, `tokenizer.padding_side = 'right'`, and "
            "generate, which pads on the left, from prompts of one length at a time"
        )


def check_same_angles(config: Any, shortest: int, longest: int) -> None:
    """Refuse to read a text and its beginnings alike where they have other angles.

    Args:
        config: The transformer's configuration, or anything else.
        shortest: Tokens of the shortest beginning that is read by itself.
        longest: Tokens of the longest text.

    Raises:
        ValueError: If the model's angles change in between.
    """
    limit = angles_change_at(config)
    if limit is not None and shortest <= limit < longest:
        raise ValueError(
            f"tokens after {shortest} and before {longest} others are wanted, and beyond {limit} "
            "the model has other rotary angles (longrope): exact moments of the tokens and of "
            f"their sum would be of two functions. Use method='sampled', or texts up to {limit} "
            "tokens"
        )


def angles_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the angles that a model's passes may write, by name."""
    return {name: b for name, b in model.named_buffers() if name.endswith(ANGLES)}


def own_angles(angles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of angles: a transform of torch.func writes into no tensor from outside of it.

    Args:
        angles: Of `angles_of`.
    """
    return {name: b.clone() for name, b in angles.items()}


def _limit(config: Any, kind: str) -> int | None:
    """Return the length at which angles of a kind change; the least, if layers differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
    longest = getattr(config, "max_position_embeddings", None)
    found = [
        longest if kind == "dynamic" else p.get("original_max_position_embeddings", longest)
        for p in by_layer
        if kind in str(p.get("rope_type", ""))
    ]
    return min((int(length) for length in found if length is not None), default=None)


def _scaled_at(config: Any) -> int | None:
    """Return from how many tokens on positions that count padding scale the queries."""
    if not getattr(config, "attn_temperature_tuning", False):
        return None
    return getattr(config, "floor_scale", None)
