"""Tensors that are views of each other are one weight, and are not taken for two."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.adapters.shared_memory import check_own_memory
from support.batches import loader, rows, token_batch
from support.models import TARGETS, base_model, excite
from support.references import assert_near, looped_jacobians


def tied():
    """PEFT's LoRA on an embedding and on the head that is tied to it."""
    base = base_model("llama-lm", tie_word_embeddings=True).double()
    targets = ["embed_tokens", "lm_head", "q_proj"]
    lora = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True, task_type="CAUSAL_LM")
    return excite(get_peft_model(base, lora)).eval()


@pytest.mark.parametrize("uncovered", ["error", "diag"])
def test_views_of_each_other_are_refused(uncovered):
    model = tied()
    names = dict(model.named_parameters())
    one = next(p for n, p in names.items() if "lora_embedding_B" in n)
    other = next(p for n, p in names.items() if "lm_head.lora_A" in n)
    assert one.data_ptr() == other.data_ptr(), "PEFT no longer makes views"
    with pytest.raises(ValueError, match=r"embed_tokens\.lora.*lm_head\.lora.* share their memory"):
        KronLoraLaplace(model, "classification", target_ids=TARGETS, uncovered=uncovered)
    other.requires_grad_(False)
    with pytest.raises(ValueError, match="share their memory"):
        KronLoraLaplace(model, "classification", target_ids=TARGETS, uncovered=uncovered)


def test_the_way_out_leads_to_right_numbers():
    model, batch = tied(), token_batch((4, 4))
    before = model(input_ids=batch["input_ids"]).logits.detach()
    for name, p in model.named_parameters():
        if "lm_head" in name:
            p.data = p.data.clone()
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    jacobians, _ = LoraGGN(wrapped, "classification").jacobians(batch)
    assert_near(jacobians, looped_jacobians(wrapped, batch))
    KronLoraLaplace(wrapped, "classification").fit(loader())


def test_the_way_out_leads_to_samples_of_a_language_model():
    model, batch = tied(), token_batch((4, 4))
    for name, p in model.named_parameters():
        if "lm_head" in name:
            p.data = p.data.clone()
    la = KronLoraLaplace(model, "language_modeling")
    texts = [{**rows(batch, n), "labels": batch["input_ids"][n]} for n in range(2)]
    la.fit(DataLoader(texts, 2))
    la.optimize_prior_precision()
    assert la.tuning.method == "widest"


def test_parts_of_one_buffer_are_not_shared():
    flat = torch.randn(24)
    model = nn.Module()
    model.first, model.second = nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:])
    check_own_memory(model)
    model.even, model.odd = nn.Parameter(torch.randn(6, 2).T), None
    model.odd = nn.Parameter(model.even.detach()[:, 1::2])
    with pytest.raises(ValueError, match="'even' and 'odd'"):
        check_own_memory(model)
    model.even = nn.Parameter(model.even.detach()[:, ::2])
    check_own_memory(model)
