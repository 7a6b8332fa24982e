"""IVON: a variational optimiser whose state is a diagonal Gaussian posterior.

Written from Shen et al. (2024), *Variational Learning is Effective for Large Deep Networks*,
arXiv:2402.17641, Algorithm 1. Its posterior goes to `DiagLoraLaplace` through `IVON.to_laplace`.
Importance scores belong to `importance`, the loop of `transformers.Trainer` to `callback`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from laplace_lora.adaptive.handover import diagonal_laplace
from laplace_lora.posterior import DiagLoraLaplace

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
UNINFORMED = 0.05  # relative change of all curvatures below which widths say nothing yet


class IVON(Optimizer):
    """Improved Variational Online Newton, for any parameters.

    The posterior of a weight is ``N(m, 1/(ess (h + weight_decay)))`` with its mean ``m`` the
    parameter itself and ``h`` an estimate of the mean loss's curvature. Draw weights, differentiate
    the *mean* loss there, step::

        for batch in loader:
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss(batch).backward()
            optimizer.step()

    Several draws before a step are averaged. Means of half-precision parameters are kept in
    float32 beside them; they would not move otherwise. Do not clip gradients, which biases the
    curvature: ``clip_radius`` bounds the steps instead.

    Args:
        params: Parameters or groups.
        lr: Step size ``α``.
        ess: Effective sample size ``λ``: the number of training examples.
        hess_init: Start ``h₀ > 0`` of the curvature.
        betas: Smoothing of gradient and curvature. A curvature smoothed less forgets its start
            sooner; see `curvature_change`.
        weight_decay: Prior precision ``δ > 0`` over ``ess``.
        clip_radius: Bound ``ξ`` on each weight's step, before ``lr``.
        rescale_lr: Multiply the step size by ``h₀ + δ``.
        generator: Source of the draws, on the parameters' device.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-2,
        *,
        ess: float,
        hess_init: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-6,
        clip_radius: float = 1e-3,
        rescale_lr: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        positive = {"ess": ess, "hess_init": hess_init, "weight_decay": weight_decay}
        positive |= {"lr": lr, "clip_radius": clip_radius}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        options = {"betas": tuple(betas), "rescale_lr": rescale_lr}
        super().__init__(params, {**positive, **options})
        self.generator = generator
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move mean and curvature by the collected gradients.

        Args:
            closure: Computes the loss and its gradients; run at drawn weights.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If no gradient was collected at drawn weights.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.sampled_params(train=True):
                loss = closure()
        self.restore()
        if not self._sums:
            raise RuntimeError(
                "no gradient was computed at drawn weights; run forward and backward inside "
                "`with optimizer.sampled_params(train=True):`"
            )
        for group, p in self._parameters():
            if p in self._sums:
                self._update(group, p, *self._sums.pop(p))
        self._sums = {}
        return loss

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

    def to_laplace(
        self,
        model: nn.Module,
        likelihood: str,
        train_loader: DataLoader | None = None,
        **kwargs: Any,
    ) -> DiagLoraLaplace:
        """Return the posterior as a `DiagLoraLaplace`: curvature ``ess·h``, prior ``ess·δ``.

        Args:
            model: The trained model, see `DiagLoraLaplace`.
            likelihood: ``"classification"`` or ``"regression"``.
            train_loader: Training data with labels, for the log evidence; without it the evidence
                is not a number.
            **kwargs: Arguments of `DiagLoraLaplace`.

        Raises:
            ValueError: If the optimiser does not hold one of the model's trainable tensors.
        """
        self.restore()
        groups = {p: group for group, p in self._parameters()}
        curvatures = {
            p: group["ess"] * self._initialised(group, p)["hessian"] for p, group in groups.items()
        }
        precisions = {p: group["ess"] * group["weight_decay"] for p, group in groups.items()}
        n_data = self.param_groups[0]["ess"]
        return diagonal_laplace(
            model, likelihood, curvatures, precisions, n_data, train_loader, **kwargs
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state, with that of its generator."""
        extra = {} if self.generator is None else {"generator": self.generator.get_state()}
        return {**super().state_dict(), **extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; numbers keep their format, whatever the parameters' is."""
        self.restore()
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "generator"})
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(order, mine, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device, copy=True)
        if self.generator is not None and "generator" in state_dict:
            self.generator.set_state(state_dict["generator"].cpu())

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

    def _update(
        self, group: dict[str, Any], p: nn.Parameter, grads: Tensor, products: Tensor, count: int
    ) -> None:
        state, decay = self.state[p], group["weight_decay"]
        beta1, beta2 = group["betas"]
        h, g = state["hessian"], state["momentum"]
        estimate = products * (group["ess"] / count) * (h + decay)
        state["step"] += 1
        g.mul_(beta1).add_(grads, alpha=(1 - beta1) / count)
        correction = (h - estimate).square_().div_(h + decay)
        h.mul_(beta2).add_(estimate, alpha=1 - beta2).add_(correction, alpha=0.5 * (1 - beta2) ** 2)
        mean = state.get("mean", p)
        step = (g / (1 - beta1 ** state["step"])).add_(mean, alpha=decay).div_(h + decay)
        step.clamp_(-group["clip_radius"], group["clip_radius"])
        scale = group["hess_init"] + decay if group["rescale_lr"] else 1.0
        mean.sub_(step, alpha=group["lr"] * scale)
        if mean is not p:
            p.copy_(mean)
