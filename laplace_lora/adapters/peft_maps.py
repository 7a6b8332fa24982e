"""Linear maps of PEFT layers that hold several in one module: AdaLoRA, and LoRA on embeddings.

Each tensor is a separate map, whose input and output gradient follow from the module's.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.adapters.maps import LinearMap


@dataclass(frozen=True, eq=False)
class TripletMap(LinearMap):
    """One of the three tensors of AdaLoRA's ``y = base(x) + c B (E ∘ (A x))``.

    ``A`` maps ``x``, ``B`` maps ``E ∘ (A x)``. ``E``, ``(r, 1)``, multiplies entry by entry and is
    treated as the bias of a map whose output gradient is ``(A x) ∘ (c Bᵀ g)`` summed over an
    example's tokens, so its curvature is exact.

    Attributes:
        adapter: Name of the adapter.
        role: ``"A"``, ``"E"`` or ``"B"``.
    """

    adapter: str = "default"
    role: str = "A"

    @property
    def sums_tokens(self) -> bool:
        """Whether `map_grad` sums over the tokens of a row: it does for ``E``."""
        return self.role == "E"

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the map's one tensor; ``E`` is treated as a bias."""
        return [(getattr(self.module, f"lora_{self.role}")[self.adapter], self.role == "E")]

    def map_input(self, x: Tensor) -> Tensor:
        """Return ``x`` for ``A``, ``A x`` for ``E``, ``E ∘ (A x)`` for ``B``."""
        A, E, _ = self._triplet()
        x = x.to(A.dtype)
        if self.role == "A":
            return x
        inner = x @ A.T
        return inner if self.role == "E" else inner * E.squeeze(-1)

    def map_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the map's output; summed over tokens for ``E``."""
        _, E, B = self._triplet()
        grad = grad.to(B.dtype) * triplet_scale(self.module, self.adapter).to(B.dtype)
        if self.role == "B":
            return grad
        inner = grad @ B
        if self.role == "A":
            return inner * E.squeeze(-1)
        return (x * inner).flatten(1, -2).sum(1) if x.ndim > 2 else x * inner

    def _triplet(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``A``, ``E`` and ``B``, detached."""
        layer, name = self.module, self.adapter
        return (
            layer.lora_A[name].detach(),
            layer.lora_E[name].detach(),
            layer.lora_B[name].detach(),
        )


def triplet_scale(layer: AdaLoraLayer, adapter: str) -> Tensor:
    """Return the factor of an AdaLoRA layer's update, as PEFT computes it."""
    scale: Tensor = layer.scaling[adapter] / (layer.ranknum[adapter].detach() + 1e-5)
    return scale


@dataclass(frozen=True, eq=False)
class EmbeddingMap(LinearMap):
    """One of the two tensors of LoRA on an embedding, ``y = base(t) + c B A e_t`` for a token t.

    The input of ``A`` is the token as a unit vector, so the input covariance is the diagonal of
    token frequencies, but for *reduce*, which averages the unit vectors of a text.

    Attributes:
        adapter: Name of the adapter.
        role: ``"A"`` or ``"B"``.
    """

    adapter: str = "default"
    role: str = "A"
    input_dims = (2,)  # token ids, (batch, tokens)

    @property
    def has_unit_inputs(self) -> bool:
        """Whether inputs are unit vectors: those of ``A`` are."""
        return self.role == "A"

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the map's one tensor."""
        return [(getattr(self.module, f"lora_embedding_{self.role}")[self.adapter], False)]

    def map_input(self, x: Tensor) -> Tensor:
        """Return unit vectors, ``(batch, tokens, vocabulary)``, for ``A``; ``A e_t`` for ``B``."""
        A = self.module.lora_embedding_A[self.adapter].detach()
        if self.role == "B":
            return F.embedding(x, A.T)
        units = F.one_hot(x, A.shape[1]).to(A.dtype)
        padding = self.module.get_base_layer().padding_idx
        if padding is not None:
            units[..., padding] = 0  # torch sends no gradient to a padding token's row
        return units

    def map_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the map's output."""
        layer = self.module
        B = layer.lora_embedding_B[self.adapter].detach()
        grad = grad.to(B.dtype) * layer.scaling[self.adapter]
        scale = layer._get_embed_scale()  # for models that scale their embeddings
        grad = grad if scale is None else grad * scale.to(grad)
        return grad if self.role == "B" else grad @ B
