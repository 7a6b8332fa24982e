"""What an adapter's tensors were before training, so that it changed nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from laplace_lora.adapters.configuration import configurations_of, configured
from laplace_lora.adapters.plain_names import adapters_in
from laplace_lora.data.inapplicable import InapplicableError

ROUNDING = 8  # units in the last place of the largest output
# What LoRA starts at the base model with; "orthogonal" has a lora_B whose product with lora_A is 0.
STARTS_AT_ZERO = (True, "gaussian", "eva", "orthogonal")
# With these values a layer gives what its base layer gives, and its derivative is not zero. Where
# several tensors are factors of one product it is the last of them, as LoRA's B is.
UNCHANGED = {
    "lora_B": 0.0,
    "lora_embedding_A": 0.0,
    "boft_R": 0.0,
    "boft_s": 1.0,
    "c3a_kernel": 0.0,
    "fourierft_spectrum": 0.0,
    "gralora_B": 0.0,
    "gralora_B_general": 0.0,
    "hada_w2_b": 0.0,
    "hira_B": 0.0,
    "hira_embedding_A": 0.0,
    "ia3_l": 1.0,
    "lokr_w1": 0.0,
    "lokr_w1_a": 0.0,
    "miss_block": 0.0,
    "oft_R": 0.0,
    "oft_embedding_R": 0.0,
    "randlora_lambda": 0.0,
    "road_theta": 0.0,
    "road_alpha": 1.0,
    "shira_weight": 0.0,
    "vera_lambda_b": 0.0,
    "waveft_spectrum": 0.0,
}


def at_base(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Return tensors of the active adapter and the values with which it changes nothing.

    Zeros for LoRA's ``lora_B`` of linear layers and convolutions, ``lora_embedding_A`` of
    embeddings, and the bias of ``lora_B``; see `UNCHANGED` for other tuners.

    Raises:
        ValueError: If there is no adapter, one that did not start at the base model, or one of a
            tuner that is not in the table.
    """
    found: list[tuple[nn.Parameter, float]] = []
    active: set[str] = set()
    for name, layer, adapter in _active_layers(model):
        active.add(adapter)
        here = list(_unchanged(layer, adapter))
        if not here:
            raise ValueError(
                f"with which weights {_tuner(layer)} changes nothing in {name!r} is not known"
            )
        found += here
    if not found:
        raise ValueError("the model has no adapter in its layers")
    for config in configurations_of(configured(model), active):
        start = config.init_lora_weights if isinstance(config, LoraConfig) else True
        if str(start).lower() == "mica":  # PEFT takes either case
            raise ValueError(
                f"the adapter was initialised with {start!r}, which starts at the base model but "
                "is not linearised there: its lora_B, which stays frozen, cannot be set to zero"
            )
        if start not in STARTS_AT_ZERO:
            raise ValueError(
                f"the adapter was initialised with {start!r}, which does not start at the base "
                "model"
            )
    return found


def _unchanged(layer: BaseTunerLayer, adapter: str) -> Iterator[tuple[nn.Parameter, float]]:
    for name, value in UNCHANGED.items():
        held = getattr(layer, name, None)
        if held is not None and adapter in held:
            tensor = held[adapter]
            tensors = [tensor] if isinstance(tensor, nn.Parameter) else tensor.parameters()
            yield from ((parameter, value) for parameter in tensors)


@contextmanager
def checked_unchanged(model: nn.Module) -> Iterator[bool]:
    """Hold layers of other tuners than LoRA against their base layers in every forward pass.

    Args:
        model: Any module with an adapter whose tensors have the values of `at_base`.

    Yields:
        Whether there are such layers.

    Raises:
        InapplicableError: In a forward pass, if a layer does not give what its base layer gives.
    """

    def compare(name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        with torch.no_grad():
            expected = layer.get_base_layer()(*args, **kwargs)
            changed = output - expected
        if not expected.numel():  # an expert to which no token goes
            return
        allowed = ROUNDING * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        if not float(changed.abs().max()) <= allowed:
            raise InapplicableError(
                f"{_tuner(layer)} changes the outputs of {name!r} with the weights that should "
                "leave them as they are"
            )

    others = {name: layer for name, layer, _ in _active_layers(model) if not _is_lora(layer)}
    with ExitStack() as hooks:
        for name, layer in others.items():
            handle = layer.register_forward_hook(partial(compare, name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield bool(others)


def base_biases_were_trained(model: nn.Module) -> bool:
    """Return whether the base model's own biases were trained, of which nothing is left."""
    active = {adapter for _, _, adapter in _active_layers(model)}
    configs = configurations_of(configured(model), active)
    return any(getattr(config, "bias", "none") != "none" for config in configs)


@torch.no_grad()
def values_at_start(model: nn.Module, head: nn.Module | None) -> list[tuple[nn.Parameter, Tensor]]:
    """Return tensors of the active adapter and the values with which the base model answers.

    Those of `at_base`; for the magnitudes of DoRA the norms of the base's weights; for whole
    modules that were trained (``modules_to_save``), but for the head, the weights they replace.

    Args:
        model: Any module with an adapter.
        head: The layer that gives the outputs, which stays as it was trained.

    Raises:
        ValueError: See `at_base`; or if replaced weights are not at hand.
    """
    values = {tensor: torch.full_like(tensor, value) for tensor, value in at_base(model)}
    kept = set() if head is None else {id(p) for p in head.parameters()}
    for name, trained, original in _replaced(model):
        if id(trained) not in kept:
            if original.device.type == "meta":
                raise ValueError(f"what {name!r} was before training is not at hand (offloaded)")
            values[trained] = original.detach().to(trained)
    for _, layer, adapter in _active_layers(model):
        if adapter in getattr(layer, "lora_magnitude_vector", {}):
            dora = layer.lora_magnitude_vector[adapter]
            values[dora.weight] = _norms(layer, adapter, dora)
    return list(values.items())


def _replaced(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield the weights of modules that were trained as a whole, and those that they replace."""
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and not module.disable_adapters:
            originals = dict(module.original_module.named_parameters())
            for adapter in set(module.active_adapters) & set(module.modules_to_save):
                for name, trained in module.modules_to_save[adapter].named_parameters():
                    yield f"{path}.{name}", trained, originals[name]


def _norms(layer: LoraLayer, adapter: str, dora: Any) -> Tensor:
    """Return what PEFT sets magnitudes to where the low-rank product is zero."""
    fresh = copy.deepcopy(dora)
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    fresh.update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=torch.zeros_like(A),
        lora_B=torch.zeros_like(B),
        scaling=layer.scaling[adapter],
    )
    norms: Tensor = fresh.weight.detach().to(dora.weight)
    return norms


def _active_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yield the layers of active adapters: their names, themselves, and the adapter's name.

    An adapter is active in all layers, in those of other adapters, too.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = adapters_in(layer)
            yield from ((name, layer, each) for each in layer.active_adapters if each in own)


def _tuner(layer: object) -> str:
    """Return the name of a layer's tuner, as that of its folder in PEFT."""
    parts = type(layer).__module__.split(".")
    return parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 2 else type(layer).__name__


def _is_lora(layer: object) -> bool:
    return isinstance(layer, LoraLayer) and _tuner(layer) == "lora"
