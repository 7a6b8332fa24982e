"""The head of a transformer: its weights, its inputs, and `LastLayerModel`, where it is alone.

A `LastLayerModel` is a classifier split into fixed features and a linear head of its own: a copy,
small and in float32 or better, so that a posterior can put samples into it. The transformer behind
the features is shared, never copied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.adapters.in_use import check_runs
from laplace_lora.adapters.peft_state import adapter_parameters
from laplace_lora.data.pairs import passes
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.models.thread_hooks import on_output

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of logits; coarser dtypes get 0.05


class _Features(nn.Module):
    """The transformer up to its head, kept out of the module tree.

    Args:
        source: A `LogitsModel`.
        adapter: The tensors of the adapter that the features are computed with.
    """

    source: Any
    adapter: Sequence[nn.Parameter]

    def __init__(self, source: Any, adapter: Sequence[nn.Parameter]) -> None:
        super().__init__()
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "adapter", adapter)

    def check_adapter(self) -> None:
        check_runs(self.source, self.adapter)

    @torch.no_grad()
    def forward(self, batch: Any) -> Tensor:
        self.check_adapter()
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
    the pooler, computed in evaluation mode and without gradients. They are those of the adapter
    that was active when the object was made: other states of the adapters are refused.

    Args:
        source: A `LogitsModel`.

    Attributes:
        head: Copy of the last layer, trainable; for answer tokens only their rows.
        copied_from: The head of the model that this one was copied from by itself, if it was.

    Raises:
        ValueError: If the model has no linear last layer.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        weight, bias = source.head_tensors()
        is_active = adapter_parameters(source)
        adapter = [p for p in source.parameters() if is_active.get(id(p))]
        self.features = _Features(source, adapter)
        self.copied_from: tuple[nn.Module, ...] = ()  # a tuple is not in the module tree
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

    def check_adapter(self) -> None:
        """Refuse adapter states in which the features would be others, see `check_runs`.

        Raises:
            RuntimeError: If the adapter does not run in the model as it is.
        """
        self.features.check_adapter()

    def forward(self, batch: Any) -> Tensor:
        """Return logits ``(batch, outputs)``, for pairs both rewards.

        Raises:
            RuntimeError: If the adapter does not run in the model as it is, see `check_runs`; or
                the logits are no linear map of the features.
        """
        features = [self.features(part) for part in passes(batch)]
        with torch.autocast(self.head.weight.device.type, enabled=False):
            return torch.cat([self.head(part) for part in features], dim=-1)

    def own_logits(self, batch: Any) -> Tensor | None:
        """Return the logits of the transformer by itself, see `LogitsModel`."""
        with evaluation_mode(self.source):  # which is no part of the module tree
            own: Tensor | None = self.source.own_logits(batch)
        return own

    def __deepcopy__(self, memo: dict[int, Any]) -> LastLayerModel:
        """Copy the head, and share the transformer unless it is being copied as well."""
        is_alone = not memo
        twin = object.__new__(type(self))
        nn.Module.__init__(twin)
        memo[id(self)] = twin
        adapter = [memo.get(id(p), p) for p in self.features.adapter]
        twin.features = _Features(memo.get(id(self.source), self.source), adapter)
        twin.head = copy.deepcopy(self.head, memo)
        twin.copied_from = (self.head,) if is_alone else copy.deepcopy(self.copied_from, memo)
        return twin

    def share_head(self) -> None:
        """Take the parameters of the head that this one was copied from, where they are equal.

        laplace-torch's last-layer classes run a copy of the model that they are given, and put
        samples of the weights into the model itself.
        """
        for original in self.copied_from:
            pairs = list(zip(original.parameters(), self.head.parameters(), strict=True))
            trained = all(p.requires_grad and q.requires_grad for p, q in pairs)
            if trained and all(p.device == q.device and torch.equal(p, q) for p, q in pairs):
                for name, parameter in original.named_parameters():
                    self.head.register_parameter(name, parameter)


def n_rows(head: Any) -> int:
    """Return the number of outputs of a head."""
    return _sizes(head)[0]


def _sizes(head: Any) -> tuple[int, int]:
    """Return outputs and inputs; a quantised weight's shape does not tell."""
    shape = head.weight.shape
    own = getattr(head, "out_features", shape[0]), getattr(head, "in_features", shape[-1])
    # PEFT's `ensure_weight_tying` makes a head of an embedding, and names the two sides reversed.
    rows, width = own[::-1] if tuple(shape) == own[::-1] else own
    return int(rows), int(width)


def head_tensors(head: Any, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight ``(outputs, d)`` and bias of a linear head, detached.

    Args:
        head: The layer, of a transformer.
        ids: Which rows; ``None`` for all.

    Raises:
        ValueError: If the layer is quantised or offloaded.
    """
    if not head.weight.is_floating_point() or head.weight.shape != _sizes(head):
        raise ValueError(
            "the last layer is quantised, but a last-layer posterior needs its weights; leave "
            "it out of the quantisation"
        )
    if head.weight.device.type == "meta":
        raise ValueError(
            "the last layer is offloaded, but a last-layer posterior needs its weights; give "
            "it a device"
        )
    if ids is None:
        return head.weight.detach(), None if head.bias is None else head.bias.detach()
    ids = ids.to(head.weight.device)
    bias = None if head.bias is None else head.bias.detach()[ids]
    return head.weight.detach()[ids], bias


def last_linear(model: nn.Module, outputs: int | None) -> nn.Linear:
    """Return the last plain linear layer of a model, the active adapter's copy if it was trained.

    Args:
        model: Any module.
        outputs: Outputs it must have; ``None`` for any number.

    Raises:
        ValueError: If there is none.
    """
    idle: set[int] = set()
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            kept = [wrapper.modules_to_save[name] for name in wrapper.active_adapters]
            every = {id(module) for module in wrapper.modules()}
            idle |= every - {id(part) for module in kept for part in module.modules()}
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and id(module) not in idle
        and outputs in (None, module.out_features)
    ]
    if not found:
        raise ValueError(
            f"the model has no linear last layer with {outputs} outputs; a last-layer posterior "
            "needs one"
        )
    return found[-1]


def seen_by_head(head: nn.Module, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return what a model's head sees of each example, ``(batch, d)``, and the model's logits.

    Args:
        head: A layer of the model.
        model: From a batch to logits ``(batch, outputs)``.
        batch: What the model takes.

    Raises:
        RuntimeError: If the head did not run once per example.
    """
    seen: list[Tensor] = []
    hook = on_output(head, lambda args, kwargs, out: seen.append(args[0]))
    try:
        logits = model(batch)
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].numel() != len(logits) * seen[0].shape[-1]:
        raise RuntimeError(
            "the last linear layer did not run once per example: "
            f"{[tuple(x.shape) for x in seen]} for logits {tuple(logits.shape)}; take a "
            "posterior over the adapter, such as KronLoraLaplace"
        )
    return seen[0].reshape(len(logits), -1), logits
