"""Drop rank-one components after training, and shrink the tensors that held them.

Only `prune_adapter` changes the function that a model computes, by dropping components that are
not zero.
"""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer

from laplace_lora.adapters.activation import adalora_layers, kept_triplets
from laplace_lora.adapters.peft_maps import triplet_scale
from laplace_lora.adapters.peft_state import check_adapters
from laplace_lora.adaptive.allocation import adalora_components
from laplace_lora.adaptive.criteria import Criterion, Function
from laplace_lora.adaptive.ivon import ivon_of
from laplace_lora.adaptive.lora_components import (
    describe_layers,
    lora_components,
    other_layers,
    shrink_lora,
)
from laplace_lora.adaptive.scores import Components, Marginals, PosteriorScore, best
from laplace_lora.adaptive.shrinking import check_optimizer, shrink
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
    keeps none loses its adapter. Adapters of embeddings stay as they are. A Laplace posterior is
    that of the unpruned adapter: fit a new one afterwards. An `IVON` shrinks with the adapter and
    goes on.

    Args:
        peft_model: A trained LoRA or AdaLoRA model.
        posterior: A fitted `KronLoraLaplace` or `DiagLoraLaplace`, or an `IVON` optimiser.
        target_r: Components to keep, on average over the layers. AdaLoRA's triplets that were
            pruned before are not counted, and go.
        criterion: Name of a criterion, or a function ``(mean, std) -> score``.
        optimizer: Another optimiser that goes on with the adapter, whose state shrinks as well.
            Without it the next step of one with a state fails; make a new one then, and in place of
            those whose state cannot shrink: factored (Adafactor), 8-bit, L-BFGS.

    Returns:
        The remaining rank of each layer, by name.

    Raises:
        TypeError: If the model has neither a LoRA nor an AdaLoRA adapter, or the optimiser is none.
        ValueError: If the target is no number from zero to the current ranks, no LoRA adapter
            would be left, the posterior does not cover the adapter, the criterion gives no score
            for each weight, the adapter has a bias, DoRA magnitudes or experts, or a start that
            PEFT subtracts from the base model, such as PiSSA's, an optimiser is given beside an
            `IVON`, or its state cannot shrink.
        FloatingPointError: If a score is not finite; names the layer.
        RuntimeError: If an adapter is merged or disabled, several are active, or the weights of an
            `IVON` are drawn.
    """
    peft_model = unwrapped(peft_model)
    check_adapters(peft_model.named_modules())
    score = PosteriorScore(posterior, criterion)
    ivon = ivon_of(posterior)
    if ivon is not None and optimizer is not None:
        raise ValueError("an IVON is the adapter's optimiser itself; leave `optimizer` out")
    optimizer = optimizer if ivon is None else ivon
    check_optimizer(optimizer)
    adapter = next(iter(peft_model.active_adapters))
    if adalora_layers(peft_model):
        components = adalora_components(peft_model.base_model.model, adapter)
        layers = [layer for layer in components if len(layer.A)]  # others were pruned before
    else:
        layers = lora_components(peft_model, adapter)
    budget = _budget(target_r, layers)
    masks = _best_alive(layers, score.scores(layers), budget)
    if layers[0].E is None:
        if not any(map(torch.any, masks)) and not other_layers(peft_model, adapter, layers):
            raise ValueError(
                f"no component would be left with target_r={target_r}, so no adapter; use a larger "
                "target_r, or the model that peft_model.unload() returns"
            )
        for layer, keep in zip(layers, masks, strict=True):
            shrink_lora(peft_model, layer, adapter, keep, optimizer)
        describe_layers(peft_model, adapter)
        return {layer.name: int(keep.sum()) for layer, keep in zip(layers, masks, strict=True)}
    with torch.no_grad():
        for layer, keep in zip(layers, masks, strict=True):
            layer.parameters[-1].masked_fill_(~keep.unsqueeze(1), 0.0)
    ranks = remove_pruned_triplets(peft_model, optimizer)
    return {layer.name: ranks[layer.name] for layer in layers}


def _budget(target_r: float, layers: list[Components]) -> int:
    """Return how many components stay in all.

    Raises:
        ValueError: If the layers have not so many, or it is no number of components.
    """
    total = sum(len(layer.A) for layer in layers)
    if 0 <= target_r < math.inf and (budget := round(target_r * len(layers))) <= total:
        return budget
    raise ValueError(
        f"target_r={target_r} must be a number from 0 to {total / len(layers):.4g}, the mean rank "
        f"of the {len(layers)} layers now, which have {total} components"
    )


def _best_alive(layers: list[Components], scores: list[Tensor], budget: int) -> list[Tensor]:
    """Return which components stay: of triplets pruned before, which use up no budget, none."""
    alive = [layer.alive for layer in layers]
    budget = min(budget, sum(int(lives.sum()) for lives in alive))
    chosen = best(layers, [score[a] for score, a in zip(scores, alive, strict=True)], budget)
    masks = [torch.zeros_like(lives) for lives in alive]
    for mask, lives, keep in zip(masks, alive, chosen, strict=True):
        mask[lives] = keep
    return masks


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
        TypeError: If the model has no AdaLoRA adapter, or the optimiser is none.
        ValueError: If the optimiser's state cannot shrink, see `prune_adapter`.
        RuntimeError: If the weights of an `IVON` are drawn.
    """
    peft_model = unwrapped(peft_model)
    if not adalora_layers(peft_model):
        raise TypeError("the model has no AdaLoRA adapter")
    check_optimizer(optimizer)
    adapter = next(iter(peft_model.active_adapters))
    config = peft_model.peft_config[adapter]
    pattern = dict(config.rank_pattern or {})
    ranks = {}
    for layer in adalora_components(peft_model.base_model.model, adapter):
        keep = layer.alive
        name = f"{layer.name}.lora_E"
        old = kept_triplets(pattern, layer.name, adapter) or [True] * len(keep)
        pattern.pop(name, None)
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
        if not keep.any():
            module.ranknum[adapter].data.zero_()  # where nothing is scaled, as PEFT loads it
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
    check_adapters(peft_model.named_modules())
    if not adalora_layers(peft_model):
        raise TypeError("the model has no AdaLoRA adapter")
    if len(peft_model.peft_config) > 1:
        raise ValueError(f"delete the other adapters first: {list(peft_model.peft_config)}")
    adapter = next(iter(peft_model.active_adapters))
    old = peft_model.peft_config[adapter]
    tensors: dict[str, tuple[Tensor, Tensor, float]] = {}
    for layer in adalora_components(peft_model.base_model.model, adapter):
        keep = layer.alive
        if bool(keep.any()):
            module = peft_model.base_model.model.get_submodule(layer.name)
            scale = float(triplet_scale(module, adapter))
            A, B, E = (tensor.detach() for tensor in layer.parameters)
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
                weight = matrices[adapter].to(value.dtype).weight
                weight.copy_(value.view_as(weight))  # AdaLoRA flattens the kernels of convolutions
    return lora


def _trained_modules(peft_model: PeftModel, adapter: str) -> dict[str, nn.Module]:
    """Return the modules that PEFT copied and trained in full, by their name in the base model."""
    return {
        name: module.modules_to_save[adapter]
        for name, module in peft_model.base_model.model.named_modules()
        if hasattr(module, "modules_to_save") and adapter in module.modules_to_save
    }
