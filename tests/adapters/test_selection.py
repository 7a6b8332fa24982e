"""Posteriors over some of the adapters."""

import pytest
import torch

from laplace_lora import FullLoraLLLaplace, KronLoraLaplace
from support.batches import loader, token_batch
from support.models import peft_model
from support.references import assert_near

BATCH = token_batch((4, 2, 6), seed=9)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("lora_B", 4),
        (r"layers\.1.*q_proj", 2),
        (["score"], 1),
        (["q_proj", "score"], 5),
        (["layers.1"], 4),
        (None, 9),
    ],
)
def test_a_posterior_may_cover_some_modules(modules, expected):
    model = peft_model("llama")
    flags = [p.requires_grad for p in model.parameters()]
    la = KronLoraLaplace(model, "classification", modules=modules, factor_rank=None)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert la.n_layers == len(la.params) == len(la.block_names) == expected
    everything = KronLoraLaplace(model, "classification", factor_rank=None)
    for posterior in (la, everything):
        posterior.fit(loader())
    whole = dict(zip(everything.block_names, everything.H_facs.kfacs, strict=True))
    for name, factors in zip(la.block_names, la.H_facs.kfacs, strict=True):
        for x, y in zip(factors, whole[name], strict=True):
            assert_near(x.matrix, y.matrix)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_what_is_not_covered_stays_at_its_map_value():
    model = peft_model("llama")
    la = KronLoraLaplace(model, "classification", modules=["score"])
    la.fit(loader())
    covered = {id(p) for p in la.params}
    others = {n: p.clone() for n, p in model.named_parameters() if id(p) not in covered}
    seen = []
    handle = la.model.register_forward_hook(
        lambda *args: seen.append(
            all(torch.equal(dict(model.named_parameters())[n], p) for n, p in others.items())
        )
    )
    la(BATCH, pred_type="nn", link_approx="mc", n_samples=3)
    handle.remove()
    assert seen == [True] * 3
    last = FullLoraLLLaplace(model, "classification")
    last.fit(loader())
    assert la.n_params == last.n_params


def test_modules_that_match_nothing_list_what_there_is():
    model = peft_model("llama")
    for modules in ("k_proj", ["q_pro"]):
        with pytest.raises(ValueError, match=r"matches no trainable module.*q_proj\.lora_A"):
            KronLoraLaplace(model, "classification", modules=modules)
    assert any(p.requires_grad for p in model.parameters())


def test_a_name_of_a_list_that_matches_nothing_is_refused(tmp_path):
    """What earlier versions saved with one can be loaded."""
    model = peft_model("llama")
    with pytest.raises(ValueError, match=r"modules=\['scor', 'k_proj'\] matches no trainable"):
        KronLoraLaplace(model, "classification", modules=["layers.1", "scor", "k_proj"])
    la = KronLoraLaplace(model, "classification", modules=["layers.1"])
    la.fit(loader())
    la.modules = ["layers.1", "scor"]
    la.save_pretrained(tmp_path, "exact")
    loaded = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert loaded.block_names == la.block_names
    assert torch.equal(loaded(BATCH), la(BATCH))
