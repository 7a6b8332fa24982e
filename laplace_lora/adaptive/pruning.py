"""Drop rank-one components after training, and shrink the tensors that held them.

Only `prune_adapter` changes the function that a model computes, by dropping components that are
not zero.
"""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from laplace_lora.adapters.peft_state import adalora_layers, check_adapters
from laplace_lora.adaptive.allocation import adalora_components
from laplace_lora.adaptive.criteria import Criterion, Function
from laplace_lora.adaptive.ivon import ivon_of
from laplace_lora.adaptive.scores import Components, Marginals, PosteriorScore, best
from laplace_lora.adaptive.shrinking import check_mean, shrink
from laplace_lora.data.sharding import unwrapped

COPIED = ("task_type", "modules_to_save", "lora_dropout", "bias", "fan_in_fan_out")


def prune_adapter(
    peft_model: PeftModel,
    posterior: Marginals,
    target_r: float,
    criterion: str | Function | Criterion = "snr_magnitude",
    optimizer: Optimizer | None = None,
) -> dict[str, int]:
    """Keep the most important components of a trained adapter, and shrink its tensors.

    Each layer keeps those of its components that are among the best of all layers; a layer that
    keeps none loses its adapter. A Laplace posterior is that of the unpruned adapter: fit a new
    one afterwards. An `IVON` shrinks with the adapter and goes on.

    Args:
        peft_model: A trained LoRA or AdaLoRA model.
        posterior: A fitted `KronLoraLaplace` or `DiagLoraLaplace`, or an `IVON` optimiser.
        target_r: Components to keep, on average over the layers.
        criterion: Name of a criterion, or a function ``(mean, std) -> score``.
        optimizer: Another optimiser that goes on with the adapter, whose state shrinks as well.
            Without it the next step of one with a state fails; make a new one then, and in place of
            those whose state is not of the tensors' shape (Adafactor, L-BFGS).

    Returns:
        The remaining rank of each layer, by name.

    Raises:
        TypeError: If the model has neither a LoRA nor an AdaLoRA adapter.
        ValueError: If the target is negative or above the current ranks, the posterior does not
            cover the adapter, the adapter has a bias or DoRA magnitudes, or an optimiser is given
            beside an `IVON`.
        FloatingPointError: If a score is not finite; names the layer.
        RuntimeError: If an adapter is merged or disabled, several are active, or the weights of an
            `IVON` are drawn.
    """
    peft_model = unwrapped(peft_model)
    check_adapters(peft_model)
    check_mean(posterior)
    score = PosteriorScore(posterior, criterion)
    ivon = ivon_of(posterior)
    if ivon is not None and optimizer is not None:
        raise ValueError("an IVON is the adapter's optimiser itself; leave `optimizer` out")
    optimizer = optimizer if ivon is None else ivon
    check_mean(optimizer)
    adapter = next(iter(peft_model.active_adapters))
    if adalora_layers(peft_model):
        layers = adalora_components(peft_model.base_model.model, adapter)
    else:
        layers = _lora_components(peft_model, adapter)
    masks = best(layers, score.scores(layers), round(target_r * len(layers)))
    ranks = {layer.name: int(keep.sum()) for layer, keep in zip(layers, masks, strict=True)}
    if layers[0].E is None:
        for layer, keep in zip(layers, masks, strict=True):
            _shrink_lora(peft_model, layer, adapter, keep, optimizer)
        _update_config(peft_model, adapter, ranks)
        return ranks
    with torch.no_grad():
        for layer, keep in zip(layers, masks, strict=True):
            layer.parameters[-1].masked_fill_(~keep.unsqueeze(1), 0.0)
    remove_pruned_triplets(peft_model, optimizer)
    return ranks


def remove_pruned_triplets(
    peft_model: PeftModel, optimizer: Optimizer | None = None
) -> dict[str, int]:
    """Shrink an AdaLoRA adapter to the triplets whose singular value is not zero.

    The model computes the same function and keeps its parameter objects, so an optimiser continues
    with shorter tensors. Call this once the ranks are final. Saved adapters stay ordinary ones.

    Args:
        peft_model: An AdaLoRA model after its last mask.
        optimizer: Its optimiser, whose state is shrunk as well.

    Returns:
        The remaining rank of each layer, by name.

    Raises:
        TypeError: If the model has no AdaLoRA adapter.
        RuntimeError: If the weights of an `IVON` are drawn.
    """
    peft_model = unwrapped(peft_model)
    if not adalora_layers(peft_model):
        raise TypeError("the model has no AdaLoRA adapter")
    check_mean(optimizer)
    adapter = next(iter(peft_model.active_adapters))
    config = peft_model.peft_config[adapter]
    pattern = dict(config.rank_pattern or {})
    ranks = {}
    for layer in adalora_components(peft_model.base_model.model, adapter):
        keep = (layer.parameters[-1] != 0).view(-1)
        name = f"{layer.name}.lora_E"
        old = pattern.pop(f"{name}.{adapter}", pattern.pop(name, [True] * len(keep)))
        if len(old) != len(keep):  # shrunk before: the pattern describes the original triplets
            remaining = iter(keep.tolist())
            pattern[f"{name}.{adapter}"] = [was_kept and next(remaining) for was_kept in old]
        else:
            pattern[f"{name}.{adapter}"] = keep.tolist()
        shrink(layer.A, keep, 0, optimizer)
        shrink(layer.parameters[-1], keep, 0, optimizer)
        shrink(layer.B, keep, 1, optimizer)
        ranks[layer.name] = int(keep.sum())
        module = peft_model.base_model.model.get_submodule(layer.name)
        module.r[adapter] = ranks[layer.name]  # scaling and ranknum stay, and so the function
    config.rank_pattern = pattern
    return ranks


def adalora_to_lora(peft_model: PeftModel) -> PeftModel:
    """Return an ordinary LoRA model that computes the same function.

    ``lora_A`` becomes ``E ∘ A``. The given model is taken apart: the new one takes over its layers
    and its trained heads. Layers whose triplets are all pruned get no adapter.

    Args:
        peft_model: An AdaLoRA model.

    Returns:
        A `PeftModel` with a rank and a scaling for each layer.

    Raises:
        TypeError: If the model has no AdaLoRA adapter.
        ValueError: If the model has other adapters as well, or all triplets are pruned.
        RuntimeError: If the adapter is merged or disabled.
    """
    peft_model = unwrapped(peft_model)
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
            module: AdaLoraLayer = peft_model.base_model.model.get_submodule(layer.name)
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
            for matrices, value in ((layer.lora_A, A), (layer.lora_B, B)):
                matrices[adapter].to(value.dtype).weight.copy_(value)
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


def _shrink_lora(
    peft_model: PeftModel,
    layer: Components,
    adapter: str,
    keep: Tensor,
    optimizer: Optimizer | None,
) -> None:
    model = peft_model.base_model.model
    module: LoraLayer = model.get_submodule(layer.name)
    rank = int(keep.sum())
    shrink(layer.A, keep, 0, optimizer)
    shrink(layer.B, keep, 1, optimizer)
    if rank == 0:  # PEFT has no LoRA of rank zero
        model.set_submodule(layer.name, module.get_base_layer())
        return
    module.lora_A[adapter].out_features = module.lora_B[adapter].in_features = rank
    divisor = math.sqrt(rank) if module.use_rslora.get(adapter) else float(rank)
    module.r[adapter], module.lora_alpha[adapter] = rank, module.scaling[adapter] * divisor


def _update_config(peft_model: PeftModel, adapter: str, ranks: dict[str, int]) -> None:
    """Describe the shrunken layers in the configuration, so that a saved adapter loads."""
    config, model = peft_model.peft_config[adapter], peft_model.base_model.model
    layers: dict[str, LoraLayer] = {
        name: model.get_submodule(name) for name, rank in ranks.items() if rank
    }
    config.target_modules = set(layers)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {name: layer.r[adapter] for name, layer in layers.items()}
    config.alpha_pattern = {name: layer.lora_alpha[adapter] for name, layer in layers.items()}


def _trained_modules(peft_model: PeftModel, adapter: str) -> dict[str, nn.Module]:
    """Return the modules that PEFT copied and trained in full, by their name in the base model."""
    return {
        name: module.modules_to_save[adapter]
        for name, module in peft_model.base_model.model.named_modules()
        if hasattr(module, "modules_to_save") and adapter in module.modules_to_save
    }
