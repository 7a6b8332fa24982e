"""`DrawnWeights`: the diagonal Gaussian posterior that an optimiser's state is.

Drawing weights, noting the gradients found there, and the posterior's widths. How mean and
curvature move belongs to `ivon`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
UNINFORMED = 0.05  # relative change of all curvatures below which widths say nothing yet


class DrawnWeights(Optimizer):
    """The half of `IVON` that is a posterior, ``N(m, 1/(ess (h + weight_decay)))``.

    Attributes:
        generator: Source of the draws, on the parameters' device.
    """

    generator: torch.Generator | None

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._drawn: list[tuple[nn.Parameter, Tensor]] | None = None
        self._sums: dict[nn.Parameter, list[Any]] = {}
        self._warned = False

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Give the model weights drawn from the posterior; the mean comes back to the bit.

        Args:
            train: Collect the gradients computed inside for the next step.

        Raises:
            RuntimeError: If a draw is already in place.
        """
        self.draw()
        try:
            yield
        except BaseException:
            self.restore(collect=False)
            raise
        self.restore(collect=train)

    @torch.no_grad()
    def draw(self) -> None:
        """Put drawn weights in place until `restore`; prefer `sampled_params`.

        Raises:
            RuntimeError: If a draw is already in place.
        """
        if self._drawn is not None:
            raise RuntimeError("weights are drawn already; restore() the mean first")
        drawn = []
        for group, p in self._parameters():
            state = self._initialised(group, p)
            drawn.append((p, p.detach().clone()))
            mean = state.get("mean", p)
            noise = torch.randn(
                p.shape, dtype=mean.dtype, device=p.device, generator=self.generator
            )
            p.copy_(mean + noise * self._std(group, state))
        self._drawn = drawn

    @torch.no_grad()
    def restore(self, collect: bool = False) -> None:
        """Put the mean back; does nothing if no draw is in place.

        Args:
            collect: Keep the gradients there are, with the perturbation that they belong to.
        """
        drawn, self._drawn = self._drawn or [], None
        for p, mean in drawn:
            if collect and p.grad is not None:
                state = self.state[p]
                grad = p.grad.to(state["hessian"].dtype)
                shift = p.to(grad.dtype) - state.get("mean", mean)
                sums = self._sums.setdefault(p, [0.0, 0.0, 0])
                sums[0], sums[1], sums[2] = sums[0] + grad, sums[1] + grad * shift, sums[2] + 1
            p.copy_(mean)

    def marginals(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Return mean and standard deviation of every weight, by parameter.

        Warns once while no curvature has moved by more than 5 % from its start: the widths are
        then the start's, and a signal-to-noise ratio is little more than a magnitude.
        """
        change = self.curvature_change()
        near = float(change[0]) >= 1 - UNINFORMED and float(change[-1]) <= 1 + UNINFORMED
        if near and not self._warned:
            self._warned = True
            warnings.warn(
                f"all curvatures lie within 5 % of their start (h/h₀ from {change[0]:.4f} to "
                f"{change[-1]:.4f}), so the posterior's widths carry no information yet; lower "
                "`hess_init` or the second of `betas`, or train longer",
                stacklevel=2,
            )
        result = {}
        for group, p in self._parameters():
            state = self._initialised(group, p)
            mean = state.get("mean", p).detach().clone()
            result[p] = (mean, self._std(group, state))
        return result

    def curvature_change(self) -> Tensor:
        """Return quantiles of ``h/h₀`` over all weights, at 0, 5, 25, 50, 75, 95 and 100 %."""
        parts = []
        for group, p in self._parameters():
            state = self._initialised(group, p)
            parts.append((state["hessian"] / group["hess_init"]).flatten().float().cpu())
        values = torch.cat(parts).sort().values
        at = torch.tensor(QUANTILES) * (len(values) - 1)
        return values[at.round().long()]

    def _parameters(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield group, p

    def _initialised(self, group: dict[str, Any], p: nn.Parameter) -> dict[str, Any]:
        state = self.state[p]
        wide = torch.promote_types(torch.float32, p.dtype)
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(p, dtype=wide)
            state["hessian"] = torch.full_like(p, group["hess_init"], dtype=wide)
        if p.dtype != wide and self._drawn is None:
            kept = state.get("mean", p).to(wide)
            # What others wrote into the parameter, a pruned zero say, counts.
            state["mean"] = torch.where(kept.to(p.dtype) == p, kept, p.to(wide)).detach()
        return state

    def _std(self, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        return (group["ess"] * (state["hessian"] + group["weight_decay"])).rsqrt()
