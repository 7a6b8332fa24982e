"""From a model to its trainable linear maps, in parameter order.

The only room that knows PEFT: which adapter is active, whether it is merged or disabled, and which
trainable tensors a Kronecker factor can cover. What flows through the maps belongs to `capture`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from laplace_lora.maps import Block, ConvMap, LinearMap, TripletMap

logger = logging.getLogger(__name__)


def activate_adapter(model: nn.Module) -> None:
    """Make the active adapter of a `PeftModel` loaded for inference trainable.

    Does nothing if something is trainable already.

    Args:
        model: Any module; only a `PeftModel` is changed.
    """
    freeze_untrainable(model)
    if not isinstance(model, PeftModel) or any(p.requires_grad for p in model.parameters()):
        return
    adapters = list(model.active_adapters)
    if len(adapters) != 1:
        return  # `trainable_maps` refuses several adapters with an explanation
    model.set_adapter(adapters[0])
    freeze_untrainable(model)
    count = sum(p.requires_grad for p in model.parameters())
    logger.info("made the %d tensors of adapter %r trainable", count, adapters[0])


def freeze_untrainable(model: nn.Module) -> None:
    """Freeze what AdaLoRA marks as trainable but is not: its rank counts, and pruned-away tensors.

    PEFT makes ``ranknum`` trainable when the base model is in half precision.
    """
    for layer in adalora_layers(model).values():
        empty = [p for part in (layer.lora_A, layer.lora_E, layer.lora_B) for p in part.values()]
        for parameter in [*layer.ranknum.values(), *(p for p in empty if p.numel() == 0)]:
            parameter.requires_grad_(False)


def adalora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that AdaLoRA adapts, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, AdaLoraLayer)}


def triplet_maps(model: nn.Module) -> Iterator[LinearMap]:
    """Yield the maps of every AdaLoRA layer over a linear one, three an active adapter."""
    for name, layer in adalora_layers(model).items():
        if isinstance(layer.get_base_layer(), nn.Conv2d):
            continue
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            r, q, p = layer.lora_A[adapter].shape[0], layer.in_features, layer.out_features
            for role, shape in {"A": (q, r), "E": (r, r), "B": (r, p)}.items():
                yield TripletMap(name, layer, *shape, False, layer, adapter, role)


def calls_twice(layer: nn.Module | None) -> bool:
    """Return whether an adapted layer calls its own maps once more than it applies them.

    PEFT's DoRA sends an identity matrix through ``lora_A`` and ``lora_B``, without gradient, to
    learn the norm of their product, before it applies them.
    """
    return any(getattr(layer, "use_dora", {}).values())


def linear_maps(model: nn.Module) -> Iterator[LinearMap]:
    """Yield every `nn.Linear`, `Conv1D` and plain `nn.Conv2d` of a model, in module order.

    They may be frozen. A convolution is plain if it has one group and pads with zeros.

    Args:
        model: Any module.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[name] = module
        if isinstance(module, nn.Conv2d):
            known = module.groups == 1 and module.padding_mode == "zeros"
            if known and not isinstance(module.padding, str):
                patch = module.weight[0].numel()
                yield ConvMap(name, module, patch, module.out_channels, False)
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        shape = (rows, columns) if transposed else (columns, rows)
        # lora_A and lora_B are dictionaries of modules, two steps below the adapted layer.
        layer = layers.get(name.rpartition(".")[0].rpartition(".")[0])
        yield LinearMap(name, module, *shape, transposed, layer)


def trainable_maps(model: nn.Module) -> tuple[list[LinearMap], list[Block]]:
    """Return the linear maps with trainable tensors, and those tensors in parameter order.

    Args:
        model: Any module, usually a `LogitsModel` around a `PeftModel`.

    Returns:
        The maps, and one block a trainable tensor in the order of ``model.parameters()``.

    Raises:
        ValueError: If nothing is trainable, or a trainable tensor belongs to no linear map or to
            several.
        RuntimeError: If an adapter is merged or disabled, or several are active.
    """
    check_adapters(model)
    maps: list[LinearMap] = []
    owners: dict[int, list[tuple[int, bool]]] = {}
    for linear in [*linear_maps(model), *triplet_maps(model)]:
        trainable = [(p, is_bias) for p, is_bias in linear.parameters() if p.requires_grad]
        if trainable:
            maps.append(linear)
        for parameter, is_bias in trainable:
            owners.setdefault(id(parameter), []).append((len(maps) - 1, is_bias))

    blocks: list[Block] = []
    uncovered: list[str] = []
    tied: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found = owners.get(id(parameter), [])
        if len(found) == 1:
            blocks.append(Block(name, parameter, *found[0]))
        else:
            (tied if found else uncovered).append(name)
    if uncovered:
        raise ValueError(
            f"no Kronecker factor covers the trainable parameters {_listed(uncovered)}: only "
            "weights and biases of nn.Linear, Conv1D and plain nn.Conv2d modules, and AdaLoRA on "
            "linear ones, are covered. Freeze them first, for example with "
            "`model.get_parameter(name).requires_grad_(False)`"
        )
    if tied:
        raise ValueError(
            f"the trainable parameters {_listed(tied)} are shared by several modules; untie or "
            "freeze them first"
        )
    if not blocks:
        raise ValueError(
            "the model has no trainable parameters, so there is nothing to be uncertain about: "
            "pass a PeftModel with an active adapter, or make one trainable with "
            "`model.set_adapter(name)`"
        )
    return maps, blocks


@contextmanager
def trainable_only(model: nn.Module, modules: str | Sequence[str] | None) -> Iterator[None]:
    """Freeze all trainable tensors but those of some modules, for a while.

    Args:
        model: Any module.
        modules: A regular expression searched for in the modules' names, a list of names or of
            whole parts of them, or ``None`` for all.

    Raises:
        ValueError: If no trainable module is meant; lists those there are.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owners = {name: name.rpartition(".")[0] for name in trainable}
    others = [p for name, p in trainable.items() if not _matches(owners[name], modules)]
    if trainable and len(others) == len(trainable):
        raise ValueError(
            f"modules={modules!r} matches no trainable module; there are "
            f"{_listed(sorted(set(owners.values())))}"
        )
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _matches(name: str, modules: str | Sequence[str] | None) -> bool:
    if modules is None:
        return True
    if isinstance(modules, str):
        return re.search(modules, name) is not None
    return any(f".{part}." in f".{name}." for part in modules)


def last_linear(model: nn.Module, outputs: int | None) -> nn.Linear:
    """Return the last plain linear layer of a model, the active adapter's copy if it was trained.

    Args:
        model: Any module.
        outputs: Outputs it must have; ``None`` for any number.

    Raises:
        ValueError: If there is none.
    """
    idle: set[int] = set()
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            kept = [wrapper.modules_to_save[name] for name in wrapper.active_adapters]
            every = {id(module) for module in wrapper.modules()}
            idle |= every - {id(part) for module in kept for part in module.modules()}
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and id(module) not in idle
        and outputs in (None, module.out_features)
    ]
    if not found:
        raise ValueError(
            f"the model has no linear last layer with {outputs} outputs; a last-layer posterior "
            "needs one"
        )
    return found[-1]


def adapter_parameters(model: nn.Module) -> dict[int, bool]:
    """Return for each tensor of an adapter, by its ``id``, whether that adapter is active.

    Tensors of the base model are not listed.

    Args:
        model: Any module.
    """
    found: dict[int, bool] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(p) for p in module.get_base_layer().parameters()}
            active = set(module.active_adapters)
            for name, p in module.named_parameters():
                if id(p) not in base:
                    found[id(p)] = bool(active & set(name.split(".")))
        elif isinstance(module, ModulesToSaveWrapper):
            for name, kept in module.modules_to_save.items():
                is_active = name in module.active_adapters
                found |= {id(p): is_active for p in kept.parameters()}
    return found


def check_adapters(model: nn.Module) -> None:
    """Refuse adapter states in which the adapter's own weights do not run.

    Raises:
        RuntimeError: If an adapter is merged or disabled, or several are active.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if layer.merged:
            raise RuntimeError(
                f"adapters {layer.merged_adapters} are merged into {name!r}; call "
                "`model.unmerge_adapter()` first"
            )
        if layer.disable_adapters:
            raise RuntimeError(
                f"the adapters of {name!r} are disabled; leave `disable_adapter()` or call "
                "`model.enable_adapter_layers()` first"
            )
        if len(layer.active_adapters) > 1:
            raise RuntimeError(
                f"adapters {list(layer.active_adapters)} are active together in {name!r}; choose "
                "one with `model.set_adapter(name)`"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
