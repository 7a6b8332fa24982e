"""`WeightPosterior`: the diagonal Gaussian posterior represented by IVON's state.

Draws weights, collects the gradients computed there, and reports the posterior's widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from laplace_lora.adaptive.earlier_gradients import EarlierGradients
from laplace_lora.data.sharding import write_values
from laplace_lora.display.warning import warn

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
UNINFORMED = 0.05  # relative change of all curvatures below which widths carry no information yet


@dataclass
class CollectedGradients:
    """Sums over the draws since the last step, for one parameter.

    Attributes:
        gradients: Sum of the gradients.
        products: Sum of the gradients times the perturbations at which they were computed, or times
            themselves, see `IVON`.
    """

    gradients: Tensor
    products: Tensor


class WeightPosterior(Optimizer):
    """The posterior ``N(m, 1/(ess (h + weight_decay)))`` of an optimiser with IVON's state.

    Attributes:
        generator: Source of the draws, on the parameters' device.
        collected: What was collected since the last step, by parameter.
        draws: At how many draws. A parameter that one of them did not use has no gradient there,
            which counts as zero.
    """

    generator: torch.Generator | None
    hess_approx: str = "price"
    OWN: ClassVar[tuple[str, ...]] = ("collected", "draws", "_means", "_warned", "_in_step")
    # With this a gradient scaler leaves it to the step to unscale and to skip, see `overflows`.
    _step_supports_amp_scaling = True
    _earlier = EarlierGradients()  # of no parameter; not for copies, which watch from their draws

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.collected: dict[nn.Parameter, CollectedGradients] = {}
        self.draws = 0
        # While a draw is in place: means, and the noise added to them.
        self._means: list[tuple[nn.Parameter, Tensor, Tensor]] | None = None
        self._warned = False
        self._in_step = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; torch's optimisers leave out all attributes of their own."""
        own = {name: getattr(self, name) for name in self.OWN}
        return {**super().__getstate__(), **own}

    @property
    def is_drawn(self) -> bool:
        """Whether drawn weights are in place."""
        return self._means is not None

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Temporarily replace the weights by a draw from the posterior; the mean returns exactly.

        In a closure that a step calls, the weights are drawn already, and collected by the step.

        Args:
            train: Collect the gradients computed inside for the next step.

        Raises:
            RuntimeError: If a draw is already in place, or as `restore`.
        """
        if self._in_step and self._means is not None:
            yield
            return
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
        if self._means is not None:
            raise RuntimeError("weights are drawn already; restore() the mean first")
        means = []
        for group, p in self.trainable():
            state = self.weight_state(group, p)
            mean = state.get("mean", p)
            noise = torch.randn(
                p.shape, dtype=mean.dtype, device=p.device, generator=self.generator
            ).mul_(_std(group, state))
            means.append((p, p.detach().clone(), noise))
            write_values(p, mean + noise)
        self._means = means
        self._earlier = EarlierGradients(p for p, _, _ in means)

    @torch.no_grad()
    def restore(self, collect: bool = False) -> None:
        """Put the mean back; does nothing if no draw is in place.

        Args:
            collect: Collect the current gradients, with the perturbation they were computed at.

        Raises:
            RuntimeError: If gradients to collect were added to those of before the draw.
        """
        means, self._means = self._means or [], None
        collect = collect and any(p.grad is not None for p, _, _ in means)
        remain = self._earlier.remain() and collect
        collect = collect and not remain
        self.draws += collect
        for p, mean, noise in means:
            if collect and p.grad is not None:
                grad = p.grad.to(noise.dtype)
                # Of a half-precision weight the noise itself, not what rounding left of it: their
                # difference is no noise of the posterior, and biases the curvature.
                factor = noise if self.hess_approx == "price" else grad
                if p not in self.collected:
                    self.collected[p] = CollectedGradients(*torch.zeros(2, *grad.shape).to(grad))
                sums = self.collected[p]
                sums.gradients = sums.gradients + grad
                sums.products = sums.products + grad * factor
            write_values(p, mean)
        if remain:
            raise RuntimeError(
                "gradients of before this draw were still in place, and would be counted as its "
                "own: call optimizer.zero_grad() in each draw, and leave its loss undivided, as "
                "IVON averages over draws; or accumulate all micro-batches of a step in one draw. "
                "accelerate's accumulate() divides losses, and zero_grad() of what prepare() "
                "returns does nothing in it: call this optimiser's own"
            )

    def forget(self) -> None:
        """Forget what was collected."""
        self.collected, self.draws = {}, 0

    def marginals(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Return mean and standard deviation of every weight, by parameter.

        Warns once while no curvature has moved by more than 5 % from its start: the widths are
        then those of the start, and a signal-to-noise ratio is little more than a magnitude.

        Raises:
            RuntimeError: If a draw is in place, which is no mean.
        """
        if self.is_drawn:
            raise RuntimeError("drawn weights are in place; restore() the mean first")
        change = self.curvature_change()
        near = float(change[0]) >= 1 - UNINFORMED and float(change[-1]) <= 1 + UNINFORMED
        if near and not self._warned:
            self._warned = True
            warn(
                f"all curvatures lie within 5 % of their start (h/h₀ from {change[0]:.4f} to "
                f"{change[-1]:.4f}), so the posterior's widths carry no information yet; lower "
                "`hess_init` or the second of `betas`, or train longer",
            )
        result = {}
        for group, p in self.trainable():
            state = self.weight_state(group, p)
            mean: Tensor = state.get("mean", p)
            result[p] = (mean.detach().clone(), _std(group, state))
        return result

    def curvature_change(self) -> Tensor:
        """Return quantiles of ``h/h₀`` over all weights, at 0, 5, 25, 50, 75, 95 and 100 %."""
        parts = []
        for group, p in self.trainable():
            state = self.weight_state(group, p)
            parts.append((state["hessian"] / group["hess_init"]).flatten().float().cpu())
        values = torch.cat(parts).sort().values
        # Single precision rounds the last index up beyond 2**24 weights.
        at = torch.tensor(QUANTILES, dtype=torch.float64) * (len(values) - 1)
        return values[at.round().long()]

    def trainable(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        """Yield every parameter that is trained, with its group."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield group, p

    def weight_state(self, group: dict[str, Any], p: nn.Parameter) -> dict[str, Any]:
        """Return a parameter's state, created if there is none yet.

        Returns:
            Number of steps, ``momentum``, ``hessian``, and for half-precision parameters the
            ``mean``, in float32 or the parameter's wider dtype.
        """
        state: dict[str, Any] = self.state[p]
        wide = torch.promote_types(torch.float32, p.dtype)
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(p, dtype=wide)
            state["hessian"] = torch.full_like(p, group["hess_init"], dtype=wide)
        if p.dtype == wide and self._means is None:
            state.pop("mean", None)  # a half-precision run's; now the parameter itself is the mean
        elif self._means is None:
            mean = state.get("mean", p).to(wide)
            # Values that were written into the parameter from outside, such as pruned zeros, count.
            state["mean"] = torch.where(mean.to(p.dtype) == p, mean, p.to(wide)).detach()
        return state


def _std(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    precision: Tensor = group["ess"] * (state["hessian"] + group["weight_decay"])
    return precision.rsqrt()
