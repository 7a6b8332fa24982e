"""IVON: a variational optimiser whose state is a diagonal Gaussian posterior.

Written from Shen et al. (2024), *Variational Learning is Effective for Large Deep Networks*,
arXiv:2402.17641, Algorithm 1: its arguments, its step and its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_lora.adaptive.gradient_scaler import overflows
from laplace_lora.adaptive.ivon_step import move
from laplace_lora.adaptive.shared_draws import add_up
from laplace_lora.adaptive.to_laplace import to_diagonal_laplace
from laplace_lora.adaptive.weight_posterior import WeightPosterior
from laplace_lora.posteriors.factored import DiagLoraLaplace

BETAS = (0.9, 0.99999)
HESS_APPROX = ("price", "gradsq")
POSITIVE = ("ess", "hess_init", "weight_decay", "lr", "clip_radius")


class IVON(WeightPosterior):
    """Improved Variational Online Newton, for any parameters.

    The posterior of a weight is ``N(m, 1/(ess (h + weight_decay)))``: the mean ``m`` is the
    parameter itself, ``h`` an estimate of the mean loss's curvature. Draw weights, differentiate
    the *mean* loss there, then step::

        for batch in loader:
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss(batch).backward()
            optimizer.step()

    Several draws before a step are averaged; where one does not use a parameter, its gradient is
    zero there, and one that none uses stays as it is. So zero the gradients in each draw and leave
    its loss undivided, which accelerate's ``accumulate`` does not; micro-batches of a single draw
    accumulate as usual. Means of half-precision parameters are kept
    in float32 beside them, or small steps would be rounded away. Do not clip gradients, which
    biases the curvature: ``clip_radius`` bounds the steps instead. A ``torch.amp.GradScaler``'s
    factor is taken out in its ``step``.

    Arguments have the names and the order of the package ivon-opt, but other defaults, which suit
    adapters: there ``lr`` has none, and ``hess_init=1.0``, ``weight_decay=1e-4``,
    ``clip_radius=inf``, ``rescale_lr=True``. Give these five to have what a script for it has.

    Args:
        params: Parameters or groups.
        lr: Step size ``α``.
        ess: Effective sample size ``λ``: the number of training examples. Required.
        hess_init: Initial value ``h₀ > 0`` of the curvature.
        beta1: Smoothing of the gradient, 0.9 by default.
        beta2: Smoothing of the curvature, 0.99999 by default. A smaller value lets the curvature
            forget its initial value sooner; see `curvature_change`.
        weight_decay: Prior precision ``δ > 0`` over ``ess``.
        mc_samples: Draws per step, of a step with a closure.
        hess_approx: Estimate of the curvature: ``"price"``, the reparameterised gradient of
            Algorithm 1, or ``"gradsq"``, the squared gradient of a batch's mean loss, as in
            ivon-opt, which is some ``ess`` over the batch's size times the curvature.
        clip_radius: Bound ``ξ`` on each weight's step, before ``lr``.
        sync: Average over processes what each collected at draws of its own, for models that are
            not in `DistributedDataParallel`. All processes must step together.
        debias: Divide the momentum by ``1 − β₁ᵗ``.
        rescale_lr: Multiply the step size by ``h₀ + δ``.
        betas: Both smoothings, instead of ``beta1`` and ``beta2``.
        generator: Source of the draws, on the parameters' device. In `DistributedDataParallel` all
            processes must draw the same: `IVONCallback` sees to it, a loop of your own gives each
            a generator with the same seed.

    Raises:
        TypeError: If ``ess`` is missing, or smoothings are given twice.
        ValueError: If an argument, or an option of a group, is out of range.
    """

    OWN = (*WeightPosterior.OWN, "mc_samples", "hess_approx", "sync", "generator")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-2,
        ess: float | None = None,
        hess_init: float = 1e-3,
        beta1: float | None = None,
        beta2: float | None = None,
        weight_decay: float = 1e-6,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = 1e-3,
        sync: bool = False,
        debias: bool = True,
        rescale_lr: bool = False,
        *,
        betas: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if ess is None:
            raise TypeError("IVON needs `ess`, the number of training examples")
        if betas is None:
            betas = (BETAS[0] if beta1 is None else beta1, BETAS[1] if beta2 is None else beta2)
        elif beta1 is not None or beta2 is not None:
            raise TypeError("give either `betas`, or `beta1` and `beta2`")
        if hess_approx not in HESS_APPROX:
            raise ValueError(f"hess_approx must be one of {HESS_APPROX}, got {hess_approx!r}")
        if mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")
        options: dict[str, Any] = {"ess": ess, "hess_init": hess_init, "lr": lr}
        options |= {"weight_decay": weight_decay, "clip_radius": clip_radius, "betas": betas}
        super().__init__(params, {**options, "rescale_lr": rescale_lr, "debias": debias})
        self.mc_samples, self.hess_approx, self.sync = mc_samples, hess_approx, sync
        self.generator = generator

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own.

        Raises:
            ValueError: If an option is out of range.
        """
        options = {**self.defaults, **param_group}
        for name in POSITIVE:
            if not options[name] > 0:
                raise ValueError(f"{name} must be positive, got {options[name]}")
        betas = options["betas"]
        is_pair = isinstance(betas, tuple | list) and len(betas) == 2
        if not is_pair or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "betas must lie in [0, 1), the two smoothings of gradient and curvature, such as "
                f"{BETAS}; got {betas}"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move mean and curvature by the collected gradients.

        Args:
            closure: Zeroes the gradients, and computes the loss and its gradients; called
                ``mc_samples`` times, each at weights drawn anew.

        Returns:
            What the closure returned, averaged over its calls.

        Raises:
            RuntimeError: If no gradient was collected at drawn weights, another process failed, or
                a gradient scaler's factor was taken out of gradients that were collected with it.
        """
        loss = None
        if closure is not None:
            losses = [self._at_a_draw(closure) for _ in range(self.mc_samples)]
            loss = losses[0] if len(losses) == 1 else sum(losses) / len(losses)
        self.restore()
        overflown = overflows(self)
        if self.sync:
            add_up(self)
        if not self.collected and overflown:
            return loss
        if not self.collected:
            raise RuntimeError(
                "no gradient was computed at drawn weights; run forward and backward inside "
                "`with optimizer.sampled_params(train=True):`"
            )
        for group, p in self.trainable():
            if p in self.collected:
                collected = self.collected.pop(p)
                move(group, p, self.state[p], collected, self.draws, self.hess_approx)
        self.forget()
        return loss

    def _at_a_draw(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad(), self.sampled_params(train=True):
            self._in_step = True
            try:
                return closure()
            finally:
                self._in_step = False

    def to_laplace(
        self,
        model: nn.Module,
        likelihood: str,
        train_loader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> DiagLoraLaplace:
        """Return the posterior as a `DiagLoraLaplace`: curvature ``ess·h``, prior ``ess·δ``.

        The trained loss must be transformers': the cross-entropy's mean over examples, or the
        squared error's over examples and outputs. The latter's widths are those of a noise with
        half as much variance as there are outputs, ``sigma_noise``'s default here. IVON's curvature
        may be negative; a posterior's is zero there, so that any prior goes with it.

        Args:
            model: The trained model, see `DiagLoraLaplace`.
            likelihood: ``"classification"`` or ``"regression"``.
            train_loader: Training data with labels, for the log evidence; without it the evidence
                is NaN.
            **kwargs: Arguments of `DiagLoraLaplace`.

        Raises:
            ValueError: If the likelihood is another, the optimiser does not hold one of the model's
                trainable tensors, or its curvature is not that of the data: it is of
                ``hess_approx="gradsq"``, or of a loss with AdaLoRA's penalty.

        Warns:
            UserWarning: If curvatures are negative.
        """
        if self.hess_approx == "gradsq":
            raise ValueError(
                "hess_approx='gradsq' estimates some N / batch size times the curvature, so the "
                "posterior would be far too narrow; train with hess_approx='price', or fit a "
                "DiagLoraLaplace"
            )
        self.restore()
        groups = {p: group for group, p in self.trainable()}
        curvatures = {
            p: group["ess"] * self.weight_state(group, p)["hessian"] for p, group in groups.items()
        }
        precisions = {p: group["ess"] * group["weight_decay"] for p, group in groups.items()}
        n_data = self.param_groups[0]["ess"]
        return to_diagonal_laplace(
            model, likelihood, curvatures, precisions, n_data, train_loader, **kwargs
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state, including its generator's.

        Raises:
            RuntimeError: If drawn weights are in place: the model's weights, which are saved along
                with this, are not the mean then.
        """
        if self.is_drawn:
            raise RuntimeError(
                "drawn weights are in place, which are no mean to save; restore() the mean first"
            )
        state = super().state_dict()
        return (
            state if self.generator is None else {**state, "generator": self.generator.get_state()}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; its tensors keep their dtype, whatever the parameters' dtype.

        A generator goes on where the state's was. An optimiser without one, as are those that
        `IVONCallback` gives one in several processes, gets it from the state.
        """
        self.restore()
        self.forget()
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "generator"})
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device, copy=True)
        saved = state_dict.get("generator")
        if saved is not None and self.generator is None and not self.sync:
            generator = torch.Generator(parameters[0].device)
            # That of another kind of device cannot be continued.
            if generator.get_state().shape == saved.shape:
                self.generator = generator
        if saved is not None and self.generator is not None:
            self.generator.set_state(saved.cpu())


def ivon_of(optimizer: object) -> IVON | None:
    """Return the IVON that an object is or, as accelerate's optimisers do, wraps."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, IVON) else None
