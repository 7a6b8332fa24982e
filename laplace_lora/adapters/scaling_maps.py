"""Vectors of adapters that scale activations, IA³ and VeRA, as maps with an exact diagonal.

Their gradients follow from what a layer gets and the gradient of what it returns, in the passes
that run anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.adapters.diagonal_maps import VectorMap
from laplace_lora.adapters.maps import Call
from laplace_lora.data.examples import Examples
from laplace_lora.data.sharding import whole


@dataclass(frozen=True, eq=False)
class IA3Map(VectorMap):
    """The vector of IA³, ``y = l ∘ base(x)``, or ``y = base(l ∘ x)`` in feedforward layers.

    What the base layer returns, or the gradient of what it gets, is taken from its own call, so no
    weight is needed, quantised or not.

    Attributes:
        adapter: Name of the adapter.
    """

    adapter: str = "default"

    @property
    def inner(self) -> nn.Module:
        """The layer that is adapted."""
        base: nn.Module = self.module.base_layer
        return base

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the vector, which is treated as a bias."""
        return [(self.module.ia3_l[self.adapter], True)]

    def step(
        self, x: Tensor, output: Tensor, inner: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what ``l`` multiplies, and the product."""
        return (x, inner[0]) if self.module.is_feedforward else (inner[1], output)

    def read(self, call: Call) -> Tensor:
        """Return what ``l`` multiplies, ``(batch, tokens, d)``."""
        return _by_token(call.x.detach())


@dataclass(frozen=True, eq=False)
class VeraMap(VectorMap):
    """One of the two vectors of VeRA's ``y = base(x) + b ∘ (B (d ∘ (A x)))``.

    Its gradients are ``Σ_t g ∘ (B (d ∘ (A x)))`` for ``b`` and ``Σ_t (A x) ∘ (Bᵀ (b ∘ g))`` for
    ``d``.

    Attributes:
        adapter: Name of the adapter.
        role: ``"b"`` or ``"d"``.
    """

    adapter: str = "default"
    role: str = "b"

    @property
    def width(self) -> int:
        """Length of an output of the layer."""
        width: int = self.module.out_features
        return width

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the vector, which is treated as a bias."""
        return [(getattr(self.module, f"vera_lambda_{self.role}")[self.adapter], True)]

    def misfit(self, calls: Sequence[Call], examples: Examples, texts: int = 1) -> str | None:
        """Return why the calls do not have the form above, ``None`` if they do."""
        dropout = self.module.vera_dropout[self.adapter]
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p:
            return f"layer {self.name!r} drops inputs at random"
        return super().misfit(calls, examples, texts)

    def read(self, call: Call) -> Tensor:
        """Return what the vector multiplies, ``(batch, tokens, d)``."""
        x, layer = call.x.detach(), self.module
        A = layer.vera_A[self.adapter][:, : layer.in_features].to(x.device)
        inner = F.linear(x.to(A.dtype), A)
        if self.role == "b":
            scaled = inner * whole(layer.vera_lambda_d[self.adapter])
            inner = F.linear(scaled, self._B(scaled))
        return _by_token(inner)

    def map_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return each example's gradient of the vector, ``(batch, d)``."""
        if self.role == "d":
            grad = grad * whole(self.module.vera_lambda_b[self.adapter])
            grad = grad @ self._B(grad)
        return super().map_grad(x, grad)

    def _B(self, like: Tensor) -> Tensor:
        B: Tensor = self.module.vera_B[self.adapter]
        return B[: self.module.out_features].to(like)


def _by_token(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, x.shape[-1])
