"""Find the layers that run on texts without images: those of the language model, not of a tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.capture.tape import Tape
from laplace_lora.data.pairs import passes, plain_name
from laplace_lora.models.inputs.image_rows import placeholders
from laplace_lora.models.inputs.unmasked import IDS, MASK

LABELS = "labels"
LENGTH = 3  # of the texts tried


def layers_of_texts(batch: Any, config: Any, record: Callable[[Any], Tape]) -> set[tuple[str, int]]:
    """Return the layers that see a row per text, by running two short texts without images.

    A layer that gets other inputs for each, in all of its calls, sees texts, whatever stands beside
    these in other batches; a tower has nothing to see, or at best an empty image of each. No
    gradient is needed, which adapters that were not trained yet may lack. Costs a forward pass.

    Args:
        batch: Texts with images, whose tokens are used.
        config: The model's configuration.
        record: From a batch of two to its recorded pass, without the layers that do not run.

    Returns:
        Names of layers and how often each is called; none where the model takes no such texts.
    """
    texts = _two_texts(batch, config)
    if texts is None:
        return set()
    try:
        tape = record(texts)
    except Exception:  # a model that cannot do without images may fail in any way
        return set()
    return {
        tape.called(i)
        for i in range(len(tape.inputs))
        if all(len(x) == 2 and not torch.equal(x[0], x[1]) for x in tape.calls(i))
    }


def _two_texts(batch: Any, config: Any) -> dict[str, Tensor] | None:
    """Return a batch of two texts of a batch's own words; ``None`` if it has less than two."""
    if not isinstance(batch, Mapping):
        return None
    ids = [text[IDS].flatten() for text in passes(batch) if isinstance(text.get(IDS), Tensor)]
    tokens = torch.cat(ids).unique() if ids else torch.empty(0)
    others = placeholders(config)
    words = [token for token in tokens.tolist() if token > 0 and token not in others]
    if len(words) < 2:
        return None
    rows = [[words[(n + t) % 2] for t in range(LENGTH)] for n in range(2)]
    texts = torch.tensor(rows, device=ids[0].device, dtype=ids[0].dtype)
    made = {IDS: texts, MASK: torch.ones_like(texts), LABELS: texts}
    return {
        key: made[plain_name(key)].clone()
        for key, value in batch.items()
        if plain_name(key) in made and isinstance(value, Tensor) and value.ndim == texts.ndim
    }
