"""Importance scores of rank-one components: AdaLoRA's sensitivity, or a posterior's criterion.

A component is AdaLoRA's triplet ``(A_i, E_i, B_i)``, or a pair ``(A_i, B_i)`` of plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from laplace_lora.adaptive.criteria import Criterion, Function, criterion_of


@dataclass(frozen=True)
class Components:
    """The rank-one components of one adapted layer.

    Attributes:
        name: Name of the layer.
        A: Right vectors, ``(r, in)``.
        B: Left vectors, ``(out, r)``.
        E: Singular values, ``(r, 1)``; ``None`` for plain LoRA.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    E: nn.Parameter | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The layer's tensors, ``E`` last."""
        return [self.A, self.B] if self.E is None else [self.A, self.B, self.E]

    @property
    def alive(self) -> Tensor:
        """Which components are left, ``(r,)``: singular values of pruned triplets are zero."""
        if self.E is None:
            return torch.ones(len(self.A), dtype=torch.bool, device=self.A.device)
        return (self.E != 0).view(-1)


class Marginals(Protocol):
    """A posterior with independent Gaussian marginals: `IVON`, or a fitted Laplace posterior."""

    def marginals(self) -> Mapping[nn.Parameter, tuple[Tensor, Tensor]]:
        """Return mean and standard deviation of every weight, by parameter."""
        ...


class ImportanceScore(Protocol):
    """The importance of components, as an allocator uses it."""

    def observe(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take a training step into account, before its gradients are zeroed."""
        ...

    def scores(self, components: list[Components]) -> list[Tensor]:
        """Return a score for each component of each layer, ``(r,)``."""
        ...

    def reset(self) -> None:
        """Forget what was observed."""
        ...


class SensitivityScore:
    """AdaLoRA's original score: smoothed sensitivity times its smoothed fluctuation.

    ``I = |θ g|``, ``Ī ← β₁ Ī + (1 − β₁) I``, ``Ū ← β₂ Ū + (1 − β₂) |I − Ī|``, score ``Ī Ū``; two
    running averages per weight. Source: Zhang et al. (2023), *AdaLoRA*, arXiv:2303.10512.

    Args:
        beta1: Smoothing of the sensitivity.
        beta2: Smoothing of its fluctuation.

    Raises:
        ValueError: If a smoothing is not between 0 and 1.
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"beta1 and beta2 must lie between 0 and 1, got {beta1} and {beta2}")
        self.beta1, self.beta2 = beta1, beta2
        self.averages: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._overflown: set[nn.Parameter] = set()

    @torch.no_grad()
    def observe(self, parameters: Iterable[nn.Parameter]) -> None:
        """Update the averages; those of weights without a gradient stay as they are.

        A tensor whose gradient is not finite, as of a step that a gradient scaler skips, has none.
        """
        for p in parameters:
            if p not in self.averages:
                self.averages[p] = (torch.zeros_like(p), torch.zeros_like(p))
            if p.grad is None:
                continue
            if not bool(p.grad.isfinite().all()):
                self._overflown.add(p)
                continue
            mean, deviation = self.averages[p]
            sensitivity = (p * p.grad).abs_()
            mean.mul_(self.beta1).add_(sensitivity, alpha=1 - self.beta1)
            change = sensitivity.sub_(mean).abs_()
            deviation.mul_(self.beta2).add_(change, alpha=1 - self.beta2)

    def scores(self, components: list[Components]) -> list[Tensor]:
        """Return the score of each component of each layer, ``(r,)``.

        Not a number where weights are not finite, or none of their gradients was.

        Raises:
            RuntimeError: If no step was observed.
        """
        if not self.averages:
            raise RuntimeError("no training step was observed, so there are no sensitivities")

        def elements(p: nn.Parameter) -> Tensor:
            mean, deviation = self.averages[p]
            never = p in self._overflown and not bool(mean.any())
            is_known = p.detach().isfinite() & (not never)
            return (mean * deviation).masked_fill(~is_known, torch.nan)

        return [_component_scores(c, elements, values_only=False) for c in components]

    def reset(self) -> None:
        """Forget the averages."""
        self.averages, self._overflown = {}, set()


class PosteriorScore:
    """Scores computed on demand from a posterior's marginals, without running averages.

    Args:
        source: An `IVON` optimiser, a `DiagLoraLaplace` or a `KronLoraLaplace`.
        criterion: Name of a criterion (see `criteria`), or a function ``(mean, std) -> score``.

    Raises:
        TypeError: If the source has no marginals.
        ValueError: If no criterion has that name.
    """

    def __init__(
        self, source: Marginals, criterion: str | Function | Criterion = "snr_magnitude"
    ) -> None:
        if not hasattr(source, "marginals"):
            raise TypeError(
                "the source must be an IVON optimiser or a fitted Diag- or KronLoraLaplace, got "
                f"{type(source).__name__}"
            )
        self.source = source
        self.criterion = criterion_of(criterion)

    def observe(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do nothing: the posterior is up to date already."""

    def scores(self, components: list[Components]) -> list[Tensor]:
        """Return the score of each component of each layer, ``(r,)``.

        Raises:
            ValueError: If the posterior does not cover a tensor, and names the layer; or the
                criterion gives anything but a score for each weight.
        """
        marginals = self.source.marginals()
        for layer in components:
            if any(p not in marginals for p in layer.parameters):
                raise ValueError(
                    f"the posterior does not cover the adapter of layer {layer.name!r}; fit one "
                    "over all adapter weights, without `modules` and not of the last layer, or "
                    "give an IVON all of them"
                )

        def elements(p: nn.Parameter) -> Tensor:
            wide = torch.promote_types(torch.float32, p.dtype)
            mean, std = (value.to(wide) for value in marginals[p])
            found = self.criterion.function(mean.view_as(p), std.view_as(p))
            if not isinstance(found, Tensor) or found.shape != p.shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"the criterion {self.criterion.name!r} must give a score for each weight, a "
                    f"tensor of the shape of `mean` and `std`, {tuple(p.shape)}; got {got}"
                )
            return found

        return [_component_scores(c, elements, self.criterion.values_only) for c in components]

    def reset(self) -> None:
        """Do nothing: there are no averages."""


def _component_scores(
    layer: Components, elements: Callable[[nn.Parameter], Tensor], values_only: bool
) -> Tensor:
    """Return ``s(E_i) + mean_j s(A_ij) + mean_k s(B_ki)``, ``(r,)``.

    A criterion of the singular value alone has none to score in plain LoRA. There a component
    vanishes as soon as either of its vectors is zero, so the cheaper one counts.
    """
    if values_only and layer.E is not None:
        return elements(layer.E).view(-1)
    # Of a convolution the entries of a vector are its kernels'.
    right, left = elements(layer.A).flatten(1), elements(layer.B).transpose(0, 1).flatten(1).T
    if values_only:
        return torch.minimum(right.sum(1), left.sum(0))
    total = right.mean(1) + left.mean(0)
    return total if layer.E is None else total + elements(layer.E).view(-1)


def best(components: list[Components], scores: list[Tensor], budget: int) -> list[Tensor]:
    """Return which components of each layer are among the ``budget`` best of all layers.

    Exactly ``budget`` components are kept; of two equal scores the earlier wins.

    Args:
        components: The layers.
        scores: Score of each component, ``(r,)`` for each layer.
        budget: How many to keep in all.

    Returns:
        Booleans ``(r,)`` for each layer.

    Raises:
        FloatingPointError: If a score is not finite; names the layer.
        ValueError: If the budget is negative or above the number of components.
    """
    for layer, score in zip(components, scores, strict=True):
        if not bool(score.isfinite().all()):
            raise FloatingPointError(f"an importance score of layer {layer.name!r} is not finite")
    device = scores[0].device
    flat = torch.cat([score.to(device).double() for score in scores])
    if not 0 <= budget <= len(flat):
        raise ValueError(f"the budget is {budget}, but there are {len(flat)} components")
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=device)
    chosen[flat.argsort(descending=True, stable=True)[:budget]] = True
    parts = chosen.split([len(score) for score in scores])
    return [part.to(score.device) for part, score in zip(parts, scores, strict=True)]
