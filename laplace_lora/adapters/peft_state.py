"""Inspect and validate the state of PEFT's adapters: active, merged or disabled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from laplace_lora.adapters.packed_weights import has_packed_weights
from laplace_lora.adapters.plain_names import adapts
from laplace_lora.display.warning import warn


def calls_twice(layer: nn.Module | None) -> bool:
    """Return whether an adapted layer calls its maps once more before it applies them.

    PEFT's DoRA first sends an identity matrix through ``lora_A`` and ``lora_B``, without gradient,
    to compute the norm of their product.
    """
    if not isinstance(layer, BaseTunerLayer):
        return False
    by_adapter = getattr(layer, "use_dora", {})
    return any(by_adapter.get(name, False) for name in layer.active_adapters)


def starts_at_tokens(model: nn.Module) -> bool:
    """Return whether an active adapter runs from certain tokens of a text on: Activated LoRA.

    PEFT looks for them among the tokens of a call, and leaves the adapter out if there are none.
    """
    return any(
        isinstance(getattr(layer, "lora_variant", {}).get(adapter), ALoraLinearVariant)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for adapter in layer.active_adapters
    )


def adapter_parameters(model: nn.Module) -> dict[int, bool]:
    """Return for each parameter of an adapter, by its ``id``, whether that adapter is active.

    Parameters of the base model are not listed.
    """
    return adapter_tensors(model, lambda module: module.named_parameters())


def adapter_tensors(
    model: nn.Module, tensors: Callable[[nn.Module], Iterable[tuple[str, Tensor]]]
) -> dict[int, bool]:
    """Return for each tensor of an adapter, by its ``id``, whether that adapter is active.

    Args:
        model: Any module.
        tensors: From a module to the tensors to list, by name: its parameters or its buffers.
    """
    is_active: dict[int, bool] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base_ids = {id(t) for _, t in tensors(module.get_base_layer())}
            for name, t in tensors(module):
                if id(t) not in base_ids:
                    is_active[id(t)] = adapter_of(module, name) in module.active_adapters
        elif isinstance(module, ModulesToSaveWrapper):
            for name, copy in module.modules_to_save.items():
                for _, t in tensors(copy):
                    is_active[id(t)] = name in module.active_adapters
    return is_active


def replaced_parameters(model: nn.Module) -> set[int]:
    """Return the ``id`` of each tensor of the base model that an active adapter's copy replaces.

    These are in modules that ``modules_to_save`` names, and nowhere else in the model.
    """
    prefixes = tuple(
        f"{name}.original_module."
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        and not module.disable_adapters
        and adapts(module)
    )
    unused: dict[int, bool] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        unused[id(p)] = unused.get(id(p), True) and name.startswith(prefixes)
    return {key for key, value in unused.items() if value}


def check_adapters(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse adapter states in which the adapter's own weights do not run.

    Raises:
        RuntimeError: If an adapter is merged or disabled, several are active, or Arrow chooses
            among several.
    """
    for name, layer in modules:
        if not isinstance(layer, BaseTunerLayer):
            continue
        if getattr(layer, "lora_arrow", None):
            raise RuntimeError(
                f"Arrow mixes several adapters by the text in {name!r}, none of which is the one "
                "to fit; load one of them by itself"
            )
        if layer.merged and has_packed_weights(layer.get_base_layer()):
            raise RuntimeError(
                f"adapters {layer.merged_adapters} are merged into the quantised weights of "
                f"{name!r}; load the base model and the adapter again, as "
                "`model.unmerge_adapter()` would round these weights anew"
            )
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


def check_has_adapter(model: nn.Module) -> None:
    """Refuse or point out a model whose adapter is gone, so that only a head is left to fit.

    Raises:
        RuntimeError: If it is a `PeftModel` without the layers of its adapter.

    Warns:
        UserWarning: If it is a transformer without adapter of which a part is trainable.
    """
    gone = "was it merged and unloaded? Use the PeftModel as it was before"
    if isinstance(model, PeftModel):
        prefix = getattr(model.base_model, "prefix", None)
        names = [name for name, _ in model.named_parameters()]
        prompts = any(config.is_prompt_learning for config in model.peft_config.values())
        if prefix and not prompts and not any(prefix in name for name in names):
            raise RuntimeError(f"the PeftModel has no layers of its adapter any more: {gone}")
        return
    if any(isinstance(m, BaseTunerLayer | ModulesToSaveWrapper) for m in model.modules()):
        return
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(model, PreTrainedModel) and 0 < len(trained) < len(list(model.parameters())):
        warn(
            f"{type(model).__name__} has no adapter, and the posterior covers only its trainable "
            f"tensors {trained[:3]}; {gone}, or a last-layer posterior if that is what you want",
        )


def adapter_of(layer: nn.Module, name: str) -> str | None:
    """Return the adapter that a tensor of one of PEFT's layers belongs to.

    Args:
        layer: The layer, which keeps tensors of several adapters in dictionaries.
        name: The tensor's name in it.
    """
    module: object = layer
    for part, following in pairwise(name.split(".")):
        module = getattr(module, part, None)
        if isinstance(module, nn.ModuleDict | nn.ParameterDict | BufferDict):
            return following
    return None
