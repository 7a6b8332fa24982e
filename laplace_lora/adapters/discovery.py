"""Find a model's trainable linear maps, and which trainable tensors they cover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import Linear as VeraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from laplace_lora.adapters.activation import adalora_layers
from laplace_lora.adapters.diagonal_maps import ElementwiseMap, WholeTensor, maps_and_blocks
from laplace_lora.adapters.maps import Block, ConvMap, LinearMap
from laplace_lora.adapters.packed_weights import packed_parts
from laplace_lora.adapters.peft_maps import EmbeddingMap, TripletMap
from laplace_lora.adapters.peft_state import check_adapters
from laplace_lora.adapters.scaling_maps import IA3Map, VeraMap
from laplace_lora.adapters.selection import is_trained, listed
from laplace_lora.adapters.shared_memory import check_own_memory

UNCOVERED = ("error", "diag")


def triplet_maps(model: nn.Module) -> Iterator[LinearMap]:
    """Yield the maps of every AdaLoRA layer on a linear one, three per active adapter."""
    for name, layer in adalora_layers(model).items():
        if isinstance(layer.get_base_layer(), nn.Conv2d):
            continue
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            r, q, p = layer.lora_A[adapter].shape[0], layer.in_features, layer.out_features
            for role, shape in {"A": (q, r), "E": (r, r), "B": (r, p)}.items():
                yield TripletMap(name, layer, *shape, False, layer, adapter, role)


def embedding_maps(model: nn.Module) -> Iterator[LinearMap]:
    """Yield the maps of every embedding that LoRA adapts, two per active adapter."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraEmbedding):
            continue
        for adapter in layer.active_adapters:
            if adapter in layer.lora_embedding_A and adapter not in layer.lora_variant:
                r, vocabulary = layer.lora_embedding_A[adapter].shape
                width = len(layer.lora_embedding_B[adapter])
                for role, shape in {"A": (vocabulary, r), "B": (r, width)}.items():
                    yield EmbeddingMap(name, layer, *shape, False, None, adapter, role)


def linear_maps(model: nn.Module) -> Iterator[LinearMap]:
    """Yield every `nn.Linear`, `Conv1D` and plain `nn.Conv2d` of a model, in module order.

    They may be frozen. A convolution is plain if it has one group and pads with zeros.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[name] = module
        if isinstance(module, nn.Conv2d):
            is_plain = module.groups == 1 and module.padding_mode == "zeros"
            if is_plain and not isinstance(module.padding, str):
                patch_size = module.weight[0].numel()
                yield ConvMap(name, module, patch_size, module.out_channels, False)
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        transposed = isinstance(module, Conv1D)
        q, p = _sizes(module)
        # lora_A and lora_B are dictionaries of modules, two levels below the adapted layer.
        layer = layers.get(name.rpartition(".")[0].rpartition(".")[0])
        yield LinearMap(name, module, q, p, transposed, layer)


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return how long a linear layer's inputs and outputs are.

    A weight that PEFT has swapped in has another rank than the layer says; one that is packed, or
    that processes hold in pieces, does not tell.
    """
    weight = module.weight
    if isinstance(module, Conv1D):
        return weight.shape[0], weight.shape[1]
    if weight.ndim == 2 and not packed_parts(weight):
        return weight.shape[1], weight.shape[0]
    return module.in_features, module.out_features


def elementwise_maps(model: nn.Module) -> Iterator[LinearMap]:
    """Yield the vectors of every layer norm and of DoRA's linear layers, in module order.

    Subclasses of torch's norms may normalise a dimension other than the last and are left out.
    """
    for name, module in model.named_modules():
        kind = type(module)
        is_known = kind in (nn.LayerNorm, nn.RMSNorm, DoraLinearLayer)
        if not is_known and not kind.__name__.endswith(("RMSNorm", "T5LayerNorm")):
            continue
        for key, p in module.named_parameters(recurse=False):
            if p.ndim == 1:
                yield ElementwiseMap(name, module, len(p), len(p), False, None, key)


def scaling_maps(model: nn.Module) -> Iterator[LinearMap]:
    """Yield the vectors of IA³ and VeRA on linear layers, in module order.

    Quantised layers are among them; convolutions are not.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, IA3Layer) and isinstance(layer.base_layer, nn.Linear | Conv1D):
            for adapter in layer.active_adapters:
                if adapter in layer.ia3_l:
                    d = layer.ia3_l[adapter].numel()
                    yield IA3Map(name, layer, d, d, False, None, adapter)
        elif isinstance(layer, VeraLinear):
            for adapter in layer.active_adapters:
                if adapter in layer.vera_lambda_d:
                    for role in ("b", "d"):
                        d = len(getattr(layer, f"vera_lambda_{role}")[adapter])
                        yield VeraMap(name, layer, d, d, False, None, adapter, role)


def trainable_maps(
    model: nn.Module, uncovered: str = "error"
) -> tuple[list[LinearMap], list[Block]]:
    """Return the linear maps with trainable tensors, and those tensors in parameter order.

    Args:
        model: Any module, usually a `LogitsModel` around a `PeftModel`.
        uncovered: How to treat trainable tensors that belong to no linear map or to several:
            ``"error"``, or ``"diag"`` to give them a diagonal block.

    Returns:
        The maps, and one block per trainable tensor in the order of ``model.parameters()``.

    Raises:
        ValueError: If nothing is trainable, ``uncovered`` is unknown, or it is ``"error"`` and a
            trainable tensor belongs to no linear map or to several; or if one lies in the memory of
            another tensor.
        RuntimeError: If an adapter is merged or disabled, or several are active, or a trainable
            tensor is offloaded.
    """
    if uncovered not in UNCOVERED:
        raise ValueError(f"uncovered must be one of {UNCOVERED}, got {uncovered!r}")
    check_adapters(model.named_modules())
    check_own_memory(model)
    maps = [*linear_maps(model), *triplet_maps(model), *embedding_maps(model)]
    if uncovered == "diag":
        maps += [*elementwise_maps(model), *scaling_maps(model)]
    owners: dict[int, list[tuple[LinearMap, bool]]] = {}
    for linear in maps:
        for parameter, is_bias in linear.parameters():
            owners.setdefault(id(parameter), []).append((linear, is_bias))

    trainable = [(name, p) for name, p in model.named_parameters() if is_trained(p)]
    holders = _holders(model)
    tied = {id(p) for _, p in trainable if holders[id(p)] > 1}
    if uncovered == "error":
        counts = {name: 2 if id(p) in tied else len(owners.get(id(p), [])) for name, p in trainable}
        _check_covered(counts)
    owned = []
    for name, parameter in trainable:
        if parameter.device.type == "meta":
            raise RuntimeError(
                f"the trainable parameter {name!r} is offloaded; keep it on a device, or freeze it"
            )
        candidates = owners.get(id(parameter), [])
        if len(candidates) == 1 and id(parameter) not in tied:
            owner, is_bias = candidates[0]
        else:
            owner, is_bias = WholeTensor.from_parameter(name, parameter), True
            maps.append(owner)
        owned.append((name, parameter, owner, is_bias))
    if not owned:
        raise ValueError(
            "the model has no trainable parameters, so there is nothing to be uncertain about: "
            "pass a PeftModel with an active adapter, or make one trainable with "
            "`model.set_adapter(name)`"
        )
    return maps_and_blocks(maps, owned)


def _holders(model: nn.Module) -> Counter[int]:
    """Return in how many modules each tensor is, by its ``id``.

    An input embedding tied to the output head is in two, one of which is no linear map.
    """
    return Counter(
        id(p) for module in set(model.modules()) for p in set(module._parameters.values())
    )


def _check_covered(owner_counts: dict[str, int]) -> None:
    """Refuse tensors, by name, that do not belong to exactly one map."""
    uncovered = [name for name, count in owner_counts.items() if count == 0]
    tied = [name for name, count in owner_counts.items() if count > 1]
    if uncovered:
        raise ValueError(
            f"no Kronecker factor covers the trainable parameters {listed(uncovered)}: only "
            "weights and biases of nn.Linear, Conv1D and plain nn.Conv2d modules, AdaLoRA on "
            "linear ones and LoRA on embeddings are covered. Freeze them first, for example with "
            "`model.get_parameter(name).requires_grad_(False)`, or give them a diagonal block with "
            "uncovered='diag' (an exact posterior stays exact), an argument of the posterior or of "
            "its backend"
        )
    if tied:
        raise ValueError(
            f"the trainable parameters {listed(tied)} are shared by several modules; untie or "
            "freeze them first, or give them a diagonal block with uncovered='diag'"
        )
