"""Tensors that no Kronecker factor covers, as maps whose curvature is an exact diagonal.

`VectorMap` is fast and for vectors that scale or shift activations: of norms and DoRA
(`ElementwiseMap`), and see `scaling_maps`. `WholeTensor` is for any tensor.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from laplace_lora.adapters.maps import ROUTING, Block, Call, LinearMap
from laplace_lora.data.examples import Examples


@dataclass(frozen=True, eq=False)
class VectorMap(LinearMap):
    """A vector by which an example's gradient is ``Σ_t g_t ∘ D_t``, where `read` returns ``D``."""

    is_diagonal = True
    has_tokens = False  # padding without effect has no gradient to sum
    sums_tokens = True

    @property
    def is_idle(self) -> bool:
        """Whether the module is that of an adapter which is disabled now."""
        return bool(getattr(self.module, "disable_adapters", False))

    @property
    def width(self) -> int:
        """Length of an output."""
        return self.out_features

    def misfit(self, calls: Sequence[Call], examples: Examples, texts: int = 1) -> str | None:
        """Return why examples cannot be told apart in the outputs, ``None`` if they can."""
        if not calls:
            return f"layer {self.name!r} did not run in the forward pass"
        for call in calls:
            out = call.output
            if (
                not isinstance(out, Tensor)
                or out.ndim < 2
                or out.shape[-1] != self.width
                or not examples.have(out)
            ):
                return f"layer {self.name!r} does not return (batch, …, {self.width})"
            if self.is_routed(out):
                return ROUTING.format(name=self.name)
        return None

    def map_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return each example's gradient of the vector, ``(batch, d)``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * grad.reshape(x.shape).to(wide)).sum(1)


@dataclass(frozen=True, eq=False)
class ElementwiseMap(VectorMap):
    """A tensor ``w`` that acts entry by entry and affinely on the last dimension.

    The weights and biases of layer norms, and DoRA's magnitudes: ``y = f(w) = f(0) + w ∘ D`` with
    ``D = f(1) − f(0)``, so an example's gradient is ``Σ_t g_t ∘ D_t``. That the module has this
    form is verified with a random ``w`` on its first call.

    Attributes:
        key: Name of the tensor in its module.
        verified: Not empty once the form has been verified.
    """

    key: str = "weight"
    verified: list[bool] = field(default_factory=list)

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the map's one tensor, which is treated as a bias."""
        return [(getattr(self.module, self.key), True)]

    def misfit(self, calls: Sequence[Call], examples: Examples, texts: int = 1) -> str | None:
        """Return why the module does not have the form above, ``None`` if it has."""
        reason = super().misfit(calls, examples, texts)
        if reason is None and not self.verified:
            if not self._is_affine(calls[0]):
                return f"layer {self.name!r} is not affine in its {self.key}, entry by entry"
            self.verified.append(True)
        return reason

    def read(self, call: Call) -> Tensor:
        """Return the derivative ``D`` of the output, ``(batch, tokens, d)``."""
        slope = self._output_at(call, 1.0) - self._output_at(call, 0.0)
        return slope.reshape(len(slope), -1, self.in_features)

    @torch.no_grad()
    def _output_at(self, call: Call, value: float | Tensor) -> Tensor:
        """Return the module's output with another value in place of the tensor."""
        parameter: Tensor = getattr(self.module, self.key)
        # On a copy that shares the tensors: other threads may be running the module.
        twin = copy.copy(self.module)
        vars(twin).update(
            _parameters={**self.module._parameters, self.key: torch.zeros_like(parameter) + value},
            _forward_hooks=OrderedDict(),
            _forward_pre_hooks=OrderedDict(),
        )
        output: Tensor = twin(*call.args, **call.kwargs)
        return output

    def _is_affine(self, call: Call) -> bool:
        parameter: Tensor = getattr(self.module, self.key)
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(self.in_features, generator=generator).to(parameter)
        change = self._output_at(call, w) - self._output_at(call, 0.0)
        expected = w * (self._output_at(call, 1.0) - self._output_at(call, 0.0))
        # Any other form is off by as much as the change itself, half precision by far less.
        return bool((change - expected).norm() <= 0.05 * expected.norm())


@dataclass(frozen=True, eq=False)
class WholeTensor(LinearMap):
    """Any tensor; its gradients come from running the model on one example at a time.

    Attributes:
        parameter: The tensor.
    """

    parameter: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.zeros(0)))
    is_diagonal = True

    @classmethod
    def from_parameter(cls, name: str, parameter: nn.Parameter) -> WholeTensor:
        """Return the map of a tensor.

        Args:
            name: Name of the tensor in the model.
            parameter: The tensor.
        """
        d = parameter.numel()
        return cls(name, None, d, d, False, None, parameter)

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the tensor, which is treated as a bias."""
        return [(self.parameter, True)]


def maps_and_blocks(
    maps: Sequence[LinearMap], owned: Sequence[tuple[str, nn.Parameter, LinearMap, bool]]
) -> tuple[list[LinearMap], list[Block]]:
    """Return the maps that own a tensor, whole tensors last, and the tensors as blocks.

    Args:
        maps: The maps, in any order.
        owned: For each trainable tensor, in parameter order: name, tensor, map, and whether it is
            a bias there.
    """
    owner_ids = {id(owner) for _, _, owner, _ in owned}
    owners = [linear for linear in maps if id(linear) in owner_ids]
    owners.sort(key=lambda linear: isinstance(linear, WholeTensor))
    index = {id(linear): i for i, linear in enumerate(owners)}
    return owners, [Block(name, p, index[id(owner)], bias) for name, p, owner, bias in owned]


def whole_instead(
    maps: Sequence[LinearMap], blocks: Sequence[Block], unfit: Sequence[int]
) -> tuple[list[LinearMap], list[Block]]:
    """Return maps and blocks with the tensors of some maps covered as whole tensors.

    Args:
        maps: The maps.
        blocks: Their trainable tensors, in parameter order.
        unfit: Indices of the maps to replace.
    """
    all_maps = list(maps)
    owned = []
    for block in blocks:
        owner, bias = maps[block.map], block.is_bias
        if block.map in unfit:
            owner, bias = WholeTensor.from_parameter(block.name, block.parameter), True
            all_maps.append(owner)
        owned.append((block.name, block.parameter, owner, bias))
    return maps_and_blocks(all_maps, owned)
