"""Base models whose weights are tensor subclasses without memory of their own, as torchao's are."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.utils._pytree import tree_map_only

from laplace_lora import KronLoraLaplace
from support.batches import loader, token_batch
from support.models import base_model, peft_model
from support.references import assert_near

BATCH = token_batch((4, 2, 6), seed=3)


class Packed(torch.Tensor):
    """A weight in 8 bits."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Packed(**parts)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        args = tree_map_only(Packed, lambda packed: packed.codes * packed.scale, args)
        return func(*args, **(kwargs or {}))


def packed(model, bits=0):
    """Pack the frozen weights of the keys; ``bits`` are added to the codes."""
    for path, module in model.named_modules():
        if path.endswith("k_proj"):
            scale = module.weight.detach().abs().max() / 100
            codes = (module.weight.detach() / scale).round().to(torch.int8) + bits
            module.weight = nn.Parameter(Packed(codes, scale), requires_grad=False)
    return model


def test_a_posterior_recognises_packed_weights(tmp_path):
    model = packed(peft_model("llama"))
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path, precision="exact")

    def loaded(bits):
        base = packed(base_model("llama"), bits)
        return KronLoraLaplace.from_pretrained(PeftModel.from_pretrained(base, tmp_path), tmp_path)

    assert_near(loaded(0)(BATCH), la(BATCH), 1e-6)
    with pytest.raises(ValueError, match="base model differs"):
        loaded(1)


def test_packed_weights_that_are_exchanged_are_noticed():
    model = packed(peft_model("llama"))
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    expected, weights = la(BATCH), {}
    for path, module in model.named_modules():
        if path.endswith("k_proj"):
            weights[module] = module.weight
            codes = module.weight.codes + 1
            module.weight = nn.Parameter(Packed(codes, module.weight.scale), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"quantised weights .* have changed"):
        la(BATCH)
    for module, weight in weights.items():
        module.weight = weight
    assert torch.equal(la(BATCH), expected)


def test_memory_is_estimated_with_packed_weights():
    la = KronLoraLaplace(packed(peft_model("llama")), "classification")
    plain = KronLoraLaplace(peft_model("llama"), "classification").estimate_memory(BATCH)
    assert la.estimate_memory(BATCH).activations >= plain.activations > 0
