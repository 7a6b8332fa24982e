"""Fingerprints: other weights and other base models are recognised, at real sizes too."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, KronLoraLLLaplace
from laplace_lora.adapters.peft_state import replaced_parameters
from laplace_lora.storage.fingerprint import SAMPLES, sampled_fingerprint
from support.batches import loader, token_batch
from support.models import llama_config, peft_model
from support.posteriors import fitted

VOCABULARY = (49152, 576)  # SmolLM2-135M: single precision rounds its last index up


def test_a_real_vocabulary_has_a_fingerprint():
    table = torch.zeros(VOCABULARY)
    plain = sampled_fingerprint([("embedding", table)])
    table[-1, -1] = 1.0
    assert sampled_fingerprint([("embedding", table)]) != plain


@pytest.mark.parametrize("rows", [1, 7, 64, 1000, 30522])
def test_the_entries_are_those_of_earlier_versions(rows):
    """Files saved before name the same base model: only an index past the end has changed."""
    size = rows * 768
    before = torch.linspace(0, size - 1, min(SAMPLES, size)).round().long()
    table = torch.zeros(rows, 768)
    plain = sampled_fingerprint([("embedding", table)])
    for index in before[before < size].tolist():
        table.view(-1)[index] = 1.0
        assert sampled_fingerprint([("embedding", table)]) != plain
        table.view(-1)[index] = 0.0


def test_other_weights_and_bases_are_refused(tmp_path):
    model = peft_model("bert", modules_to_save=None)
    la = fitted(model=model, modules=["query"])
    la.save_pretrained(tmp_path)
    names = dict(model.named_parameters())
    query = next(p for n, p in names.items() if "query.lora_A" in n)
    value = next(p for n, p in names.items() if "value.lora_A" in n)
    base = names["base_model.model.bert.encoder.layer.1.output.dense.weight"]
    cases = [(query, "weights are not those"), (value, "other trained weights"), (base, "the base")]
    for tensor, message in cases:
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.mul_(1.01)
        with pytest.raises(ValueError, match=message):
            KronLoraLaplace.from_pretrained(model, tmp_path)
        with torch.no_grad():
            tensor.copy_(kept)
    KronLoraLaplace.from_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="covers other tensors than the model trains"):
        KronLoraLaplace.from_pretrained(peft_model("bert", r=3, modules_to_save=None), tmp_path)
    with pytest.raises(ValueError, match=r"load it with KronLoraLaplace\.from_pretrained"):
        DiagLoraLaplace.from_pretrained(model, tmp_path)


def test_a_head_that_the_adapter_replaces_may_be_another(tmp_path):
    """A base model without a head gets a random one each time it is loaded."""
    model = peft_model("bert")
    la = fitted(model=model)
    la.save_pretrained(tmp_path, precision="exact")
    head = model.base_model.model.classifier
    with torch.no_grad():
        head.original_module.weight.add_(1.0)
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    batch = token_batch((4, 2, 5), seed=3)
    assert torch.equal(again(batch), la(batch))
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    with pytest.raises(ValueError, match="weights are not those"):
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_a_table_tied_to_a_replaced_head_is_still_in_use():
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
        model = get_peft_model(base, lora)
    head, table = base.lm_head, base.model.embed_tokens.weight
    assert head.original_module.weight is table and replaced_parameters(model) == set()
    head.original_module.weight = torch.nn.Parameter(table.detach().clone())
    assert replaced_parameters(model) == {id(head.original_module.weight)}
    with model.disable_adapter():
        assert replaced_parameters(model) == set()


@pytest.mark.parametrize("cls", [KronLoraLaplace, KronLoraLLLaplace])
def test_the_adapter_in_bfloat16_is_recognised_and_said_to_be_rounded(tmp_path, cls):
    model = peft_model("bert", dtype=torch.float32)
    la = cls(model, "classification")
    la.fit(loader())
    la.save_pretrained(tmp_path)
    batch = token_batch((6, 3, 5))
    full = la(batch)
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"rounded to a coarser dtype: they differ by \d\.\de-0\d"):
        again = cls.from_pretrained(model, tmp_path)
    assert (again(batch) - full).abs().max() < 0.02
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "classifier.modules_to_save" in n).mul_(1.1)
    with pytest.raises(ValueError, match="weights are not those"):
        cls.from_pretrained(model, tmp_path)
