"""`LastLayerModel`: a classifier split into fixed features and a linear head of its own.

The head is a copy, small and in float32 or better, so that a posterior can put samples into it; the
transformer behind the features is shared, never copied. Finding head and features in a transformer
belongs to `models`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.guard import evaluation_mode
from laplace_lora.preferences import passes

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of logits; coarser formats get 0.05


class _Features(nn.Module):
    """The transformer up to its head, kept out of the module tree."""

    source: Any

    def __init__(self, source: Any) -> None:
        super().__init__()
        object.__setattr__(self, "source", source)

    @torch.no_grad()
    def forward(self, batch: Any) -> Tensor:
        with evaluation_mode(self.source):
            features, logits = self.source.features(batch)
        weight, bias = self.source.head_tensors()
        wide = torch.promote_types(torch.float32, weight.dtype)
        features = features.to(logits.device, wide)  # a model may be spread over devices
        linear = F.linear(
            features, weight.to(features), None if bias is None else bias.to(features)
        )
        bound = TOLERANCE.get(weight.dtype, 0.05) * (1 + logits.abs().max())
        if linear.shape != logits.shape or bool((linear - logits).abs().max() > bound):
            raise RuntimeError(
                "the logits are not a linear map of the last layer's input (an adapter on the "
                "head, or a transformation after it?), which a last-layer posterior needs"
            )
        return features


class LastLayerModel(nn.Module):
    """``head(features(batch))`` with a head of its own over a shared transformer.

    Features are those that the model's own head sees: of the last real token, the first token or
    the pooler, computed in evaluation mode and without gradients.

    Args:
        source: A `LogitsModel`.

    Attributes:
        head: Copy of the last layer, trainable; for answer tokens only their rows.

    Raises:
        ValueError: If the model has no linear last layer.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        weight, bias = source.head_tensors()
        self.features = _Features(source)
        wide = torch.promote_types(torch.float32, weight.dtype)
        outputs, inputs = weight.shape
        self.head = nn.Linear(inputs, outputs, bias is not None, device=source.device, dtype=wide)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            if bias is not None:
                self.head.bias.copy_(bias)

    @property
    def source(self) -> Any:
        """The `LogitsModel` whose features these are."""
        return self.features.source

    def forward(self, batch: Any) -> Tensor:
        """Return logits ``(batch, outputs)``, for pairs both rewards."""
        return torch.cat([self.head(self.features(part)) for part in passes(batch)], dim=-1)

    def __deepcopy__(self, memo: dict[int, Any]) -> LastLayerModel:
        """Copy the head, share the transformer."""
        return LastLayerModel(self.features.source)
