"""LoRA on token embeddings: the input of ``A`` is a token as a unit vector."""

import pytest
import torch
from torch.nn import functional as F

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import LENGTHS, loader, token_batch
from support.models import PAD, TARGETS, VOCABULARY, peft_model
from support.references import assert_near, explicit_jacobians

NAMES = {
    "bert": ["word_embeddings", "query"],
    "llama-lm": ["embed_tokens", "q_proj"],
    "gpt2": ["wte"],
}


def embedded(name):
    kwargs = {"fan_in_fan_out": False} if name == "gpt2" else {}
    model = peft_model(name, target_modules=NAMES[name], **kwargs)
    return LogitsModel(model, target_ids=TARGETS if name.endswith("-lm") else None).eval()


@pytest.mark.parametrize("name", NAMES)
def test_jacobians_equal_jacrev(name):
    model, batch = embedded(name), token_batch((4, 2, 5))
    backend = LoraGGN(model, "classification")
    assert any("lora_embedding_A" in block.name for block in backend.blocks)
    _, blocks = backend.engine.jacobian_blocks(batch)
    assert_near(list(blocks), explicit_jacobians(model, batch))


def test_factors_equal_an_explicit_loop():
    model, batch = embedded("bert"), token_batch(LENGTHS)
    backend = LoraGGN(model, "classification")
    _, kron = backend.kron(batch, batch["labels"], N=len(LENGTHS))
    by_name = dict(zip([b.name for b in backend.blocks], kron.kfacs, strict=True))
    name, layer = next(
        (n, m)
        for n, m in model.named_modules()
        if hasattr(m, "lora_embedding_A") and len(m.lora_embedding_A)
    )
    A, B = (getattr(layer, f"lora_embedding_{role}")["default"].detach() for role in "AB")
    mask = batch["attention_mask"].double()
    share = mask / mask.sum(1, keepdim=True) / len(LENGTHS)
    ids = batch["input_ids"]
    frequencies = torch.zeros(VOCABULARY, dtype=torch.float64).index_add_(
        0, ids.flatten(), share.flatten()
    )
    frequencies[PAD] = 0
    seen = {}
    handle = layer.register_forward_hook(lambda m, args, out: seen.update(y=out))
    f = model(batch)
    handle.remove()
    grads = {"A": 0, "B": 0}
    for column in softmax_root(f.detach()):
        g = torch.autograd.grad(f, seen["y"], column, retain_graph=True)[0]
        g = g * layer.scaling["default"]
        for role, grad in (("A", g @ B), ("B", g)):
            grads[role] = grads[role] + torch.einsum("nti,ntj,nt->ij", grad, grad, mask)
    inner = F.embedding(ids, A.T)
    inputs = torch.einsum("nti,ntj,nt->ij", inner, inner, share)
    assert_near(by_name[f"{name}.lora_embedding_A.default"], [grads["A"], frequencies.diag()])
    assert_near(by_name[f"{name}.lora_embedding_B.default"], [grads["B"], inputs])


def test_a_low_rank_posterior_fits_and_comes_back(tmp_path):
    la = KronLoraLaplace(embedded("bert"), "classification", factor_rank=4, low_rank_threshold=20)
    la.fit(loader())
    la.optimize_prior_precision()
    batch = token_batch((3, 2))
    la.save_pretrained(tmp_path, precision="exact")
    assert torch.equal(KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)(batch), la(batch))
    reference = la.log_marginal_likelihood()
    la.fit(loader(7, pad_to=12))
    assert_near(la.log_marginal_likelihood(), reference)


def test_positions_have_no_batch_and_are_refused_by_name():
    model = peft_model("bert", target_modules=["position_embeddings"])
    with pytest.raises(RuntimeError, match=r"position_embeddings' received an input of shape"):
        KronLoraLaplace(model, "classification").fit(loader())
