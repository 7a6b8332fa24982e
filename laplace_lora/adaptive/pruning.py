"""Dropping rank-one components after training, and shrinking the tensors that held them.

Scores are `importance`'s. The function that a model computes changes only where a component that
was not zero is dropped, in `prune_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from laplace_lora.adapters.peft_state import adalora_layers, check_adapters
from laplace_lora.adaptive.allocation import adalora_components
from laplace_lora.adaptive.criteria import Criterion, Function
from laplace_lora.adaptive.scores import Components, PosteriorScore, Source, best

COPIED = ("task_type", "modules_to_save", "lora_dropout", "bias", "fan_in_fan_out")


def prune_adapter(
    peft_model: PeftModel,
    posterior: Source,
    target_r: float,
    criterion: str | Function | Criterion = "snr_magnitude",
) -> dict[str, int]:
    """Keep the most important components of a trained adapter, and shrink its tensors.

    Each layer keeps as many as are among the best of all layers; those that keep none lose their
    adapter. The posterior is that of the unpruned adapter: fit a new one afterwards.

    Args:
        peft_model: A trained LoRA or AdaLoRA model.
        posterior: A fitted `KronLoraLaplace` or `DiagLoraLaplace`, or an `IVON` optimiser.
        target_r: Components to keep, on average over the layers.
        criterion: Name of a criterion, or a function ``(mean, std) -> score``.

    Returns:
        The rank that each layer keeps, by name.

    Raises:
        TypeError: If the model has neither a LoRA nor an AdaLoRA adapter.
        ValueError: If the target is negative or above the present ranks, the posterior does not
            cover the adapter, or the adapter has a bias or DoRA magnitudes.
        FloatingPointError: If a score is not finite; names the layer.
        RuntimeError: If an adapter is merged or disabled, or several are active.
    """
    check_adapters(peft_model)
    score = PosteriorScore(posterior, criterion)
    adapter = next(iter(peft_model.active_adapters))
    if adalora_layers(peft_model):
        layers = adalora_components(peft_model.base_model.model, adapter)
    else:
        layers = _lora_components(peft_model, adapter)
    kept = best(layers, score.scores(layers), round(target_r * len(layers)))
    ranks = {layer.name: int(keep.sum()) for layer, keep in zip(layers, kept, strict=True)}
    if layers[0].E is None:
        for layer, keep in zip(layers, kept, strict=True):
            _shrink_lora(peft_model, layer.name, adapter, keep)
        _describe(peft_model, adapter, ranks)
        return ranks
    with torch.no_grad():
        for layer, keep in zip(layers, kept, strict=True):
            layer.parameters[-1].masked_fill_(~keep.unsqueeze(1), 0.0)
    remove_pruned_triplets(peft_model)
    return ranks


def remove_pruned_triplets(
    peft_model: PeftModel, optimizer: Optimizer | None = None
) -> dict[str, int]:
    """Shrink an AdaLoRA adapter to the triplets whose singular value is not zero.

    The function computed stays the same, and so do the parameter objects: an optimiser goes on
    with shorter tensors. Call it once the ranks are final. Saved adapters stay ordinary ones.

    Args:
        peft_model: An AdaLoRA model after its last mask.
        optimizer: Its optimiser, whose state is shrunk alike.

    Returns:
        The rank that each layer keeps, by name.

    Raises:
        TypeError: If the model has no AdaLoRA adapter.
    """
    found = adalora_layers(peft_model)
    if not found:
        raise TypeError("the model has no AdaLoRA adapter")
    adapter = next(iter(peft_model.active_adapters))
    config = peft_model.peft_config[adapter]
    pattern = dict(config.rank_pattern or {})
    ranks = {}
    for layer in adalora_components(peft_model.base_model.model, adapter):
        keep = (layer.parameters[-1] != 0).view(-1)
        name = f"{layer.name}.lora_E"
        old = pattern.pop(f"{name}.{adapter}", pattern.pop(name, [True] * len(keep)))
        if len(old) != len(keep):  # shrunk before: the pattern speaks of the original triplets
            still = iter(keep.tolist())
            pattern[f"{name}.{adapter}"] = [was and next(still) for was in old]
        else:
            pattern[f"{name}.{adapter}"] = keep.tolist()
        _shrink(layer.A, keep, 0, optimizer)
        _shrink(layer.parameters[-1], keep, 0, optimizer)
        _shrink(layer.B, keep, 1, optimizer)
        ranks[layer.name] = int(keep.sum())
        module = peft_model.base_model.model.get_submodule(layer.name)
        module.r[adapter] = ranks[layer.name]  # scaling and ranknum stay: so does the function
    config.rank_pattern = pattern
    return ranks


def adalora_to_lora(peft_model: PeftModel) -> PeftModel:
    """Return an ordinary LoRA model that computes the same function.

    ``lora_A`` becomes ``E ∘ A``. The given model is taken apart: its layers and its trained heads
    are the new one's. Layers whose triplets are all pruned get no adapter.

    Args:
        peft_model: An AdaLoRA model.

    Returns:
        A `PeftModel` with a rank and a scaling for each layer.

    Raises:
        TypeError: If the model has no AdaLoRA adapter.
        ValueError: If it has other adapters as well, or nothing of it is left.
        RuntimeError: If the adapter is merged or disabled.
    """
    check_adapters(peft_model)
    if not adalora_layers(peft_model):
        raise TypeError("the model has no AdaLoRA adapter")
    if len(peft_model.peft_config) > 1:
        raise ValueError(f"delete the other adapters first: {list(peft_model.peft_config)}")
    adapter = next(iter(peft_model.active_adapters))
    old = peft_model.peft_config[adapter]
    tensors: dict[str, tuple[Tensor, Tensor, float]] = {}
    for layer in adalora_components(peft_model.base_model.model, adapter):
        E = layer.parameters[-1].detach()
        keep = (E != 0).view(-1)
        if bool(keep.any()):
            module: Any = peft_model.base_model.model.get_submodule(layer.name)
            scale = float(module.scaling[adapter] / (module.ranknum[adapter] + 1e-5))
            A, B = layer.A.detach(), layer.B.detach()
            tensors[layer.name] = ((A * E)[keep].clone(), B[:, keep].clone(), scale)
    if not tensors:
        raise ValueError("all triplets are pruned, so no adapter would be left")
    ranks = {name: len(A) for name, (A, _, _) in tensors.items()}
    options = {name: getattr(old, name) for name in COPIED}
    heads = _trained_modules(peft_model, adapter)
    base = peft_model.unload()
    for name, module in heads.items():
        base.set_submodule(name, module)
    config = LoraConfig(
        r=max(ranks.values()),
        target_modules=sorted(tensors),
        rank_pattern=ranks,
        alpha_pattern={name: scale * ranks[name] for name, (_, _, scale) in tensors.items()},
        **options,
    )
    lora = get_peft_model(base, config, adapter_name=adapter, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, (A, B, _) in tensors.items():
            layer = base.get_submodule(name)
            for part, value in ((layer.lora_A, A), (layer.lora_B, B)):
                part[adapter].to(value.dtype).weight.copy_(value)
    return lora


def _lora_components(peft_model: PeftModel, adapter: str) -> list[Components]:
    layers = []
    for name, module in peft_model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, AdaLoraLayer):
            continue
        if adapter not in module.lora_A:
            continue
        if module.use_dora.get(adapter) or module.lora_bias.get(adapter):
            raise ValueError(f"layer {name!r} has a LoRA bias or DoRA magnitude; it cannot shrink")
        layers.append(
            Components(name, module.lora_A[adapter].weight, module.lora_B[adapter].weight)
        )
    if not layers:
        raise TypeError("the model has neither a LoRA nor an AdaLoRA adapter on linear layers")
    return layers


def _shrink(p: nn.Parameter, keep: Tensor, dim: int, optimizer: Optimizer | None = None) -> None:
    """Keep some rows or columns of a parameter, and of what an optimiser remembers of it."""
    index = keep.nonzero().view(-1).to(p.device)
    shape = p.shape
    p.data = p.data.index_select(dim, index).clone()
    if p.numel() == 0:
        p.requires_grad_(False)
    p.grad = None if p.grad is None else p.grad.index_select(dim, index)
    state = {} if optimizer is None else optimizer.state.get(p, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[name] = value.index_select(dim, index).clone()


def _shrink_lora(peft_model: PeftModel, name: str, adapter: str, keep: Tensor) -> None:
    model = peft_model.base_model.model
    module: Any = model.get_submodule(name)
    rank = int(keep.sum())
    if rank == 0:  # PEFT knows no LoRA of rank zero
        model.set_submodule(name, module.get_base_layer())
        return
    _shrink(module.lora_A[adapter].weight, keep, 0)
    _shrink(module.lora_B[adapter].weight, keep, 1)
    module.lora_A[adapter].out_features = module.lora_B[adapter].in_features = rank
    of: Callable[[float], float] = math.sqrt if module.use_rslora.get(adapter) else float
    module.r[adapter], module.lora_alpha[adapter] = rank, module.scaling[adapter] * of(rank)


def _describe(peft_model: PeftModel, adapter: str, ranks: dict[str, int]) -> None:
    """Let the configuration say what the shrunken layers are, so that a saved adapter loads."""
    config, model = peft_model.peft_config[adapter], peft_model.base_model.model
    left: dict[str, Any] = {name: model.get_submodule(name) for name, r in ranks.items() if r}
    config.target_modules = set(left)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {name: module.r[adapter] for name, module in left.items()}
    config.alpha_pattern = {name: module.lora_alpha[adapter] for name, module in left.items()}


def _trained_modules(peft_model: PeftModel, adapter: str) -> dict[str, nn.Module]:
    """Return the copies of modules that PEFT trained whole, by their place in the base model."""
    return {
        name: module.modules_to_save[adapter]
        for name, module in peft_model.base_model.model.named_modules()
        if hasattr(module, "modules_to_save") and adapter in module.modules_to_save
    }
