"""Tensors that no Kronecker factor covers, as maps whose curvature is an exact diagonal.

`ElementwiseMap` is the fast way, for tensors that scale or shift what passes by; `WholeTensor` the
way for any tensor. Which tensors are which belongs to `adapters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laplace_lora.adapters.maps import Block, Call, LinearMap


@dataclass(frozen=True, eq=False)
class ElementwiseMap(LinearMap):
    """A tensor ``w`` that acts entry by entry and affinely on the last dimension.

    The weights and biases of layer norms and DoRA's magnitudes: ``y = f(w) = f(0) + w ∘ D`` with
    ``D = f(1) − f(0)``, so an example's gradient is ``Σ_t g_t ∘ D_t``. That the module is of this
    form is seen from a random ``w`` when it first runs.

    Attributes:
        key: Name of the tensor in its module.
        verified: Holds something once the form has been seen.
    """

    key: str = "weight"
    verified: list[bool] = field(default_factory=list)

    @property
    def is_diagonal(self) -> bool:
        """The map's curvature is kept as a diagonal."""
        return True

    @property
    def has_tokens(self) -> bool:
        """All tokens are summed over; padding that does not matter has no gradient."""
        return False

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the map's one tensor, which counts as a bias."""
        return [(getattr(self.module, self.key), True)]

    def sides(self, parameter: nn.Parameter) -> list[int]:
        """Return the length of the tensor."""
        return [parameter.numel()]

    def misfit(self, calls: Sequence[Call], batch: int, texts: int = 1) -> str | None:
        """Return why the map is not of the form that its class stands for, ``None`` if it is."""
        if not calls:
            return f"layer {self.name!r} did not run in the forward pass"
        d = self.in_features
        for call in calls:
            out = call.output
            if (
                not isinstance(out, Tensor)
                or out.ndim < 2
                or out.shape[:: out.ndim - 1] != (batch, d)
            ):
                return f"layer {self.name!r} does not return (batch, …, {d})"
        if not self.verified:
            if not self._is_affine(calls[0]):
                return f"layer {self.name!r} is not affine in its {self.key}, entry by entry"
            self.verified.append(True)
        return None

    def read(self, call: Call) -> Tensor:
        """Return the derivative ``D`` of the output, ``(batch, tokens, d)``."""
        slope = self._at(call, 1.0) - self._at(call, 0.0)
        return slope.reshape(len(slope), -1, self.in_features)

    def own_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return each example's gradient of the tensor, ``(batch, d)``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * grad.reshape(x.shape).to(wide)).sum(1)

    @torch.no_grad()
    def _at(self, call: Call, value: float | Tensor) -> Tensor:
        """Return the module's output with another value in place of the tensor."""
        parameter = getattr(self.module, self.key)
        other = torch.zeros_like(parameter) + value
        return functional_call(self.module, {self.key: other}, call.args, dict(call.kwargs))

    def _is_affine(self, call: Call) -> bool:
        parameter = getattr(self.module, self.key)
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(self.in_features, generator=generator).to(parameter)
        change = self._at(call, w) - self._at(call, 0.0)
        expected = w * (self._at(call, 1.0) - self._at(call, 0.0))
        # Anything else is off by as much as the change itself, half precision by far less.
        return bool((change - expected).norm() <= 0.05 * expected.norm())


@dataclass(frozen=True, eq=False)
class WholeTensor(LinearMap):
    """Any tensor; its gradients come from running the model on each example alone.

    Attributes:
        parameter: The tensor.
    """

    parameter: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.zeros(0)))

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter) -> WholeTensor:
        """Return the map of a tensor.

        Args:
            name: Name of the tensor in the model.
            parameter: The tensor.
        """
        d = parameter.numel()
        return cls(name, None, d, d, False, None, parameter)

    @property
    def is_diagonal(self) -> bool:
        """The map's curvature is kept as a diagonal."""
        return True

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the tensor, which counts as a bias."""
        return [(self.parameter, True)]

    def sides(self, parameter: nn.Parameter) -> list[int]:
        """Return the number of the tensor's entries."""
        return [parameter.numel()]


def in_order(
    maps: Sequence[LinearMap], owned: Sequence[tuple[str, nn.Parameter, LinearMap, bool]]
) -> tuple[list[LinearMap], list[Block]]:
    """Return the maps that own a tensor, whole tensors last, and the tensors as their blocks.

    Args:
        maps: The maps, in any order.
        owned: For each trainable tensor, in parameter order, its name, itself, its map and whether
            it is a bias there.
    """
    used = {id(owner) for _, _, owner, _ in owned}
    kept = [linear for linear in maps if id(linear) in used]
    kept.sort(key=lambda linear: isinstance(linear, WholeTensor))
    index = {id(linear): i for i, linear in enumerate(kept)}
    return kept, [Block(name, p, index[id(owner)], bias) for name, p, owner, bias in owned]


def whole_instead(
    maps: Sequence[LinearMap], blocks: Sequence[Block], unfit: Sequence[int]
) -> tuple[list[LinearMap], list[Block]]:
    """Return maps and blocks with the tensors of some maps covered as whole tensors.

    Args:
        maps: The maps.
        blocks: Their trainable tensors, in parameter order.
        unfit: Indices of the maps to be replaced.
    """
    everything = list(maps)
    owned = []
    for block in blocks:
        owner, bias = maps[block.map], block.is_bias
        if block.map in unfit:
            owner, bias = WholeTensor.of(block.name, block.parameter), True
            everything.append(owner)
        owned.append((block.name, block.parameter, owner, bias))
    return in_order(everything, owned)
