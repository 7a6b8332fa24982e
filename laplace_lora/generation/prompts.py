"""Prompts as they are continued: padding on the left, whatever side it was on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.configuration import reads_tasks
from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.modes import coarsest_dtype, evaluation_mode
from laplace_lora.models.inputs.batch_checks import check_adapter
from laplace_lora.models.inputs.unmasked import check_is_masked
from laplace_lora.models.token_model import TokenModel
from laplace_lora.models.tolerances import near

TEXT = ("input_ids", "attention_mask")
UNREAD = (*TEXT, "labels")  # need no look
TASKS = "task_ids"


def left_padded(inputs: Any, device: torch.device, config: Any) -> tuple[Tensor, Tensor]:
    """Return token numbers and mask with the padding, wherever it was, on the left.

    Args:
        inputs: A mapping with ``input_ids`` and, if padded, ``attention_mask``; or the token
            numbers alone, ``(texts, tokens)``.
        device: Where to put them.
        config: The transformer's configuration, which names the padding token.

    Raises:
        ValueError: If there are no prompts, one is empty, or one is padded without a mask.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        raise ValueError(
            "prompts are missing: generate needs 'input_ids' of shape (texts, tokens), from a "
            "tokenizer with return_tensors='pt'"
        )
    ids = ids.long()
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None:
        check_is_masked({"input_ids": ids}, config, "it would be continued as text")
    mask = torch.ones_like(ids) if mask is None else (mask != 0).to(ids)
    if not bool(mask.any(1).all()):
        raise ValueError("a prompt has no real token; begin it with the tokenizer's bos token")
    order = mask.argsort(dim=1, stable=True)
    ids, mask = (x.gather(1, order).to(device) for x in (ids, mask))
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def check_text_suffices(model: TokenModel, inputs: Any) -> None:
    """Refuse prompts that mean something else without what stands beside their tokens.

    Args:
        model: The language model.
        inputs: Prompts, as `left_padded` takes them.

    Raises:
        ValueError: If images, positions and the like change what follows, names them; or see
            `check_adapter`.
    """
    if not isinstance(inputs, Mapping):
        return
    check_adapter(inputs)
    others = [key for key in inputs if key not in UNREAD and model.accepts(key)]
    others = [key for key in others if isinstance(inputs[key], Tensor)]
    needed = [key for key in (TASKS,) if key in inputs and reads_tasks(model)]
    others = [key for key in others if key not in needed]
    if needed or (others and not _suffices(model, inputs, others)):
        others += needed
        raise ValueError(
            f"generate continues tokens alone, and the prompts have {others}, on which the model's "
            "logits depend; write texts with model.generate and read them with `score`, which "
            "takes all that the model takes"
        )


def _suffices(model: TokenModel, inputs: Mapping[str, Any], others: list[str]) -> bool:
    """Return whether logits after the prompts are the same without some of the inputs."""
    text = {key: inputs[key] for key in TEXT if key in inputs}
    with evaluation_mode(model), as_called():
        whole = model.next_logits({**text, **{key: inputs[key] for key in others}})
        return near(model.next_logits(text), whole, coarsest_dtype(model))
