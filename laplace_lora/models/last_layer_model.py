"""`LastLayerModel`: a classifier split into fixed features and a linear head of its own.

The head is a copy, small and in float32 or better, so that a posterior can put samples into it. The
transformer behind the features is shared, never copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.adapters.in_use import check_runs
from laplace_lora.adapters.peft_state import adapter_parameters
from laplace_lora.data.pairs import passes
from laplace_lora.data.sharding import write_values
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.head import NOT_LINEAR, are_same

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of logits
ROUNDINGS = 4  # of the logits, and of sums on the way to them, in coarser dtypes


class _Features(nn.Module):
    """The transformer up to its head, kept out of the module tree.

    Args:
        source: A `LogitsModel`.
        adapter: The tensors of the adapter that the features are computed with.
        taken: The source's head as it was when its copy was made, see `take_head`.
    """

    source: Any
    adapter: Sequence[nn.Parameter]

    def __init__(
        self, source: Any, adapter: Sequence[nn.Parameter], taken: list[Tensor] | None = None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "adapter", adapter)
        self.taken = [] if taken is None else taken

    def check_adapter(self) -> None:
        check_runs(self.source, self.adapter)

    @torch.no_grad()
    def take_head(self, head: nn.Linear) -> None:
        """Copy the weights of the source's head into another, and remember them."""
        theirs = [tensor for tensor in self.source.head_tensors() if tensor is not None]
        head.to(self.source.device, torch.promote_types(torch.float32, theirs[0].dtype))
        for ours, tensor in zip(head.parameters(), theirs, strict=True):
            write_values(ours, tensor)
        self.taken[:] = [ours.detach().clone() for ours in head.parameters()]

    @torch.no_grad()
    def forward(self, batch: Any) -> Tensor:
        self.check_adapter()
        with evaluation_mode(self.source):
            features, logits = self.source.features(batch)
        weight, bias = self.source.head_tensors()
        heads = zip([weight] if bias is None else [weight, bias], self.taken, strict=True)
        if not all(are_same(now, then) for now, then in heads):
            raise RuntimeError(
                "the model's last layer is no longer the one that the LastLayerModel's head was "
                "copied from (was the model trained on?), so its features do not go with the head; "
                "make a new LastLayerModel and a new posterior over it"
            )
        wide = torch.promote_types(torch.float32, weight.dtype)
        computed = max(weight.dtype, features.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        features = features.to(logits.device, wide)  # a model may be spread over devices
        linear = F.linear(
            features, weight.to(features), None if bias is None else bias.to(features)
        )
        bound = _bound(features, weight, logits, computed)
        if linear.shape != logits.shape or bool((linear - logits).abs().max() > bound):
            raise RuntimeError(NOT_LINEAR)
        return features


def _bound(features: Tensor, weight: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return by how much logits computed in a dtype may differ from the linear map by rounding."""
    size = logits.abs().max()
    if dtype in TOLERANCE:
        return TOLERANCE[dtype] * (1 + size)
    # Terms that cancel each other leave the rounding of sums of some of them.
    sums = F.linear(features.square(), weight.to(features).square()).sqrt().max()
    return ROUNDINGS * torch.finfo(dtype).eps * (size + sums)


class LastLayerModel(nn.Module):
    """``head(features(batch))`` with a head of its own over a shared transformer.

    Features are those that the model's own head sees: of the last real token, the first token or
    the pooler, computed in evaluation mode and without gradients. They are those of the adapter
    that was active when the object was made: other states of the adapters are refused.

    Args:
        source: A `LogitsModel`.

    Attributes:
        head: Copy of the last layer, trainable; for answer tokens only their rows.
        copied_from: The model that this one was copied from by itself, if it was.

    Raises:
        ValueError: If the model has no linear last layer.
    """

    @in_full_precision
    def __init__(self, source: Any) -> None:
        super().__init__()
        weight, bias = source.head_tensors()
        is_active = adapter_parameters(source)
        adapter = [p for p in source.parameters() if is_active.get(id(p))]
        self.features = _Features(source, adapter)
        self.copied_from: tuple[LastLayerModel, ...] = ()  # a tuple is not in the module tree
        outputs, inputs = weight.shape
        # Its values are the model's: torch's random generator has no part in them.
        self.head = nn.utils.skip_init(
            nn.Linear, inputs, outputs, bias is not None, device=source.device
        )
        self.take_head()

    @property
    def source(self) -> Any:
        """The `LogitsModel` whose features these are."""
        return self.features.source

    def take_head(self) -> None:
        """Copy the weights of the model's last layer, as they are now, in float32 or better."""
        self.features.take_head(self.head)

    @contextmanager
    def new_head(self) -> Iterator[None]:
        """Take the head of the model as it is now; the one before comes back after an error."""
        before = [parameter.detach().clone() for parameter in self.head.parameters()]
        taken = list(self.features.taken)
        self.take_head()
        try:
            yield
        except BaseException:
            for parameter, tensor in zip(self.head.parameters(), before, strict=True):
                parameter.data = tensor
            self.features.taken[:] = taken
            raise

    def check_adapter(self) -> None:
        """Refuse adapter states in which the features would be others, see `check_runs`.

        Raises:
            RuntimeError: If the adapter does not run in the model as it is.
        """
        self.features.check_adapter()

    def forward(self, batch: Any) -> Tensor:
        """Return logits ``(batch, outputs)``, for pairs both rewards.

        Raises:
            RuntimeError: If the adapter does not run in the model as it is, see `check_runs`; the
                model's last layer has changed since it was copied; or the logits are no linear map
                of the features.
        """
        features = [self.features(part) for part in passes(batch)]
        with torch.autocast(self.head.weight.device.type, enabled=False):
            return torch.cat([self.head(part) for part in features], dim=-1)

    def own_logits(self, batch: Any) -> Tensor | None:
        """Return the logits of the transformer by itself, but for its head's rounding.

        ``None`` where the head has other weights than the transformer's, such as a sample.
        """
        own_head = (self.head.weight, self.head.bias)
        for ours, theirs in zip(own_head, self.source.head_tensors(), strict=True):
            if ours is not None and theirs is not None and not torch.equal(ours, theirs.to(ours)):
                return None
        with evaluation_mode(self.source):  # which is no part of the module tree
            own: Tensor | None = self.source.own_logits(batch)
            if own is None:
                return None
            rounded = [self.source.features(part)[1] for part in passes(batch)]
        # Its head may compute in half precision, by a cast or under its own autocast.
        rounding = self(batch) - torch.cat(rounded, dim=-1)
        return own + rounding if own.shape == rounding.shape else own

    def __deepcopy__(self, memo: dict[int, Any]) -> LastLayerModel:
        """Copy the head, and share the transformer unless it is being copied as well."""
        is_alone = not memo
        twin = object.__new__(type(self))
        nn.Module.__init__(twin)
        memo[id(self)] = twin
        adapter = [memo.get(id(p), p) for p in self.features.adapter]
        taken = copy.deepcopy(self.features.taken, memo)
        twin.features = _Features(memo.get(id(self.source), self.source), adapter, taken)
        twin.head = copy.deepcopy(self.head, memo)
        twin.copied_from = (self,) if is_alone else copy.deepcopy(self.copied_from, memo)
        return twin

    def share_head(self) -> None:
        """Take the head of the model that this one was copied from, where the two are equal.

        laplace-torch's last-layer classes run a copy of the model that they are given, and put
        samples of the weights into the model itself.
        """
        for original in self.copied_from:
            pairs = list(zip(original.head.parameters(), self.head.parameters(), strict=True))
            trained = all(p.requires_grad and q.requires_grad for p, q in pairs)
            if trained and all(p.device == q.device and torch.equal(p, q) for p, q in pairs):
                for name, parameter in original.head.named_parameters():
                    self.head.register_parameter(name, parameter)
                self.features.taken = original.features.taken  # of whichever takes a head next
