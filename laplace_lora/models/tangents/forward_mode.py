"""`ForwardMode`: directional derivatives of a model in many directions, beside its values.

A direction in weight space is carried through the network as a tangent (Pearlmutter 1994, *Fast
exact multiplication by the Hessian*, for one direction; Griewank & Walther 2008, *Evaluating
derivatives*, ch. 3). The values are computed once, whatever the number of directions, and nothing
is kept for a backward pass.

All of it runs on a twin, see `resampled`, so the user's model keeps its weights, its mode, its
attention implementation and its hooks, and other threads may run it meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_lora.adapters.grouped_attention import differentiable_attention
from laplace_lora.adapters.in_use import check_runs
from laplace_lora.data.inapplicable import InapplicableError
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.changes.twins import twin_of
from laplace_lora.models.inputs.rotary import angles_of, own_angles
from laplace_lora.models.tangents.frozen_maps import differentiate_inputs_only

# Its kernels round the inputs as well, so they have no derivative.
QUANTISED = "Linear8bitLt"

# Multiplies with the weights of all experts at once, and has no forward derivative.
GROUPED = "grouped_mm"

# Hides its formula in an `autograd.Function`, so has no forward derivative.
BLOOM = "BloomGelu"

# torch counts the levels of forward differentiation for all threads together.
_LEVELS = threading.RLock()


class NoForwardDerivativeError(InapplicableError):
    """A model, or one of its operations, cannot carry tangents."""


class ForwardMode(nn.Module):
    """A model whose values and tangents are computed together, see `forward_mode`.

    Args:
        model: A twin, which nobody else uses.
        names: Names of the tensors that the directions move, as the twin has them.
        directions: For each of these tensors ``(directions, *shape)``.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], directions: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.model = model
        own = dict(model.named_parameters())
        self._weights = {name: own[name].detach() for name in names}
        self._directions = dict(zip(names, directions, strict=True))
        # As Falcon does, whatever it is told; torch's other kernels have no forward derivative.
        configs: Any = (getattr(module, "config", None) for module in model.modules())
        self._calls_sdpa = any(getattr(c, "_attn_implementation", "") == "sdpa" for c in configs)

    @property
    def n_directions(self) -> int:
        """How many directions are carried along."""
        return len(next(iter(self._directions.values())))

    def parts(self, size: int) -> Iterator[ForwardMode]:
        """Yield the same with at most so many of the directions, in their order."""
        split = {name: part.split(size) for name, part in self._directions.items()}
        for directions in zip(*split.values(), strict=True):
            yield ForwardMode(self.model, list(split), directions)

    @torch.no_grad()
    def run(
        self,
        arguments: dict[str, Any],
        read: Callable[[Any], dict[str, Tensor]],
        place: Callable[[dict[str, Tensor]], dict[str, Any]] | None = None,
        carried: dict[str, Tensor] | None = None,
        tangents: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the model once, in all directions.

        Args:
            arguments: What the model takes, and does not depend on the weights.
            read: From what the model returns to tensors by name.
            place: From tensors of earlier runs to further arguments.
            carried: These tensors. The model may write into them.
            tangents: Their tangents, ``(directions, *shape)`` each; written into likewise.

        Returns:
            What ``read`` finds, and its tangents, ``(directions, *shape)`` each.

        Raises:
            NoForwardDerivativeError: If an operation of the model has none; names it.
        """
        carried, tangents = carried or {}, tangents or {}
        angles = angles_of(self.model)  # the last pass may have made two of them one tensor

        def output(weights: dict[str, Tensor], carried: dict[str, Tensor]) -> dict[str, Tensor]:
            placed = {} if place is None else place(carried)
            tensors = {**weights, **own_angles(angles)}
            return read(functional_call(self.model, tensors, (), {**arguments, **placed}))

        def along(
            direction: dict[str, Tensor], tangent: dict[str, Tensor]
        ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            found = jvp(output, (self._weights, carried), (direction, tangent))
            return found[0], found[1]

        try:
            shared: Any = (None, 0)  # the values do not depend on the direction
            with _LEVELS, sdpa_kernel(SDPBackend.MATH) if self._calls_sdpa else nullcontext():
                values, slopes = vmap(along, out_dims=shared)(self._directions, tangents)
        except (NotImplementedError, RuntimeError) as error:
            if not _is_missing_rule(error):
                raise
            raise NoForwardDerivativeError(
                "the model has an operation without forward derivative, which samples by forward "
                f"mode need; use method='exact' ({str(error).splitlines()[0]})"
            ) from error
        return values, slopes


@contextmanager
def forward_mode(
    model: nn.Module, parameters: Sequence[nn.Parameter], directions: Tensor
) -> Iterator[ForwardMode]:
    """Yield a twin of a model that carries directions of its weights along.

    Attention and mixtures of experts run in implementations with a forward derivative there, which
    the fused kernels lack.

    Args:
        model: Any module, in any mode; the twin is in evaluation mode.
        parameters: Its trainable tensors.
        directions: Flat, in the order of the tensors, ``(directions, parameters)``.

    Raises:
        NoForwardDerivativeError: If the model cannot have a twin, is quantised to 8 bits by
            bitsandbytes, or stacked weights are adapted; names the layer.
        RuntimeError: If a tensor does not run in the model as it is, see `check_runs`.
    """
    check_runs(model, parameters)
    for name, module in model.named_modules():
        if type(module).__name__ == QUANTISED:
            raise NoForwardDerivativeError(
                f"{name} is quantised ({QUANTISED}), which has no forward derivative; use "
                "method='exact', or load the base model in bfloat16 or 4 bits"
            )
        if isinstance(module, LoraLayer) and hasattr(module, "parameter_name"):
            raise NoForwardDerivativeError(
                f"{name} adapts stacked weights (target_parameters), which PEFT writes into the "
                "model while it runs, so they carry no tangents; use method='exact'"
            )
    twin, own = twin_of(model, parameters)
    if twin is None:
        raise NoForwardDerivativeError(
            "the model is compiled, offloaded or sharded, cannot be copied, or a module's forward "
            "pass was replaced by one that refers to the model; samples by forward mode need a "
            "copy of its modules; use method='exact'"
        )
    numbers = {id(parameter): index for index, parameter in enumerate(own)}
    names = {numbers[id(p)]: name for name, p in twin.named_parameters() if id(p) in numbers}
    parts = [
        part.unflatten(1, p.shape).to(p.device, p.dtype)
        for part, p in zip(directions.split([p.numel() for p in own], dim=1), own, strict=True)
    ]
    transformers = (m for m in twin.modules() if hasattr(m, "set_attn_implementation"))
    transformer: Any = next(transformers, None)  # reaches all models inside
    if transformer is not None:
        transformer.set_attn_implementation(differentiable_attention(transformer))
        if getattr(transformer.config, "_experts_implementation", None) == GROUPED:
            transformer.set_experts_implementation("eager")
    if any(p.dtype == torch.float64 for p in twin.parameters()):
        for module in twin.modules():
            module.register_forward_pre_hook(_bound_mask, with_kwargs=True)
    _drop_input_gradients(twin)
    differentiate_inputs_only(twin, set(numbers))
    _uncover_formulas(twin)
    with evaluation_mode(twin):
        yield ForwardMode(twin, [names[index] for index in range(len(own))], parts)


def _drop_input_gradients(twin: nn.Module) -> None:
    """Remove the hooks that gradient checkpointing needs at the embeddings of a frozen model.

    They ask the embeddings' outputs for gradients, which those that carry tangents cannot have.
    """
    for module in twin.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[key]


def _uncover_formulas(twin: nn.Module) -> None:
    """Let activations compute by torch's own operations, not by an `autograd.Function`."""
    for module in twin.modules():
        if type(module).__name__ == BLOOM and "forward" not in vars(module):
            vars(module)["forward"] = _gelu


def _gelu(x: Tensor) -> Tensor:
    """Approximate the GELU by a tanh, with the constant that BLOOM has rounded.

    Source: Hendrycks & Gimpel (2016), arXiv:1606.08415, Sec. 2.
    """
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


def _bound_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let padding that attends to nothing have numbers all the same.

    The least float64 is minus infinity to the softmax, which is taken in float32.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return None
    return args, {**kwargs, "attention_mask": mask.clamp(min=torch.finfo(torch.float32).min)}


def _is_missing_rule(error: Exception) -> bool:
    # The last where a forward pass writes to weights, as PEFT's context-aware prompt tuning does.
    words = ("forward AD with", "jvp", "vmap", "batching rule", "functorch transform")
    return any(word in str(error) for word in words)
