"""Split a batch into what a model takes and labels, one for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import label_tensor


def split_mapping_or_pair(batch: Any, label_key: str, device: torch.device) -> tuple[Any, Tensor]:
    """Split a batch into what the model takes and labels on a device.

    Args:
        batch: A mapping with labels, or a pair of inputs and labels.
        label_key: Key of the labels.
        device: Where the labels go.

    Raises:
        ValueError: If labels are missing, or are not as many as the inputs' rows.
        TypeError: If the batch is neither mapping nor pair, or labels are no numbers.
    """
    if isinstance(batch, Mapping):
        if label_key not in batch:
            raise ValueError(
                f"a batch has no {label_key!r}, only {sorted(batch)}; add the labels, or name "
                "their key with `dict_key_y`"
            )
        return batch, _counted(label_tensor(batch[label_key]), batch, device)
    if isinstance(batch, Sequence) and len(batch) == 2:
        return batch[0], _counted(label_tensor(batch[1]), batch[0], device)
    raise TypeError(
        f"a batch must be a mapping with {label_key!r} or a pair of inputs and labels, got "
        f"{type(batch).__name__}"
    )


def _counted(y: Tensor, x: Any, device: torch.device) -> Tensor:
    """Return labels on a device, and refuse them if no input has as many rows."""
    inputs = list(x.values()) if isinstance(x, Mapping) else [x]
    rows = [len(v) for v in inputs if isinstance(v, Tensor) and v.ndim and v is not y]
    # Of vision-language models some inputs have a row per image, so one that fits is enough.
    if rows and (y.ndim == 0 or len(y) not in rows):
        raise ValueError(
            f"a batch has {rows[0]} rows, but labels of shape {tuple(y.shape)}; give each row one"
        )
    return y.to(device)
