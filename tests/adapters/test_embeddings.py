"""LoRA on token embeddings: the input of ``A`` is a token as a unit vector."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.commands.description import describe
from laplace_lora.curvature.kfac_rows import KfacRows
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


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("residual", ["isotropic", "zero"])
def test_token_frequencies_are_exact_at_any_rank(corrected, residual):
    """Only this side is low-rank, so nothing is lost."""
    model = embedded("bert")
    low, dense = (
        KronLoraLaplace(
            model,
            "classification",
            factor_rank=rank,
            low_rank_threshold=20,
            residual=residual,
            eigenvalue_correction=corrected,
            modules=["lora_embedding_A"],
        )
        for rank in (3, None)
    )
    batch = token_batch((3, 2))
    for la in (low, dense):
        la.fit(loader())
    assert low.H_facs.nbytes < 8 * 2 * VOCABULARY
    assert low.estimate_memory(batch).curvature == dense.estimate_memory(batch).curvature
    assert_near(low.log_marginal_likelihood(), dense.log_marginal_likelihood(), 1e-12)
    assert_near(low(batch), dense(batch), 1e-12)


@pytest.mark.parametrize("way", ["exact", "half", "state_dict"])
def test_parts_come_back_and_equal_one_fit(way, tmp_path):
    model, data = embedded("bert"), loader(1).dataset
    options = {"factor_rank": 3, "low_rank_threshold": 20, "modules": ["lora_embedding_A"]}
    whole, some, rest, again = (
        KronLoraLaplace(model, "classification", **options) for _ in range(4)
    )
    for la, examples in ((whole, data), (some, data[:2]), (rest, data[3:])):
        la.fit(DataLoader(examples, batch_size=2))
    if way == "state_dict":
        again.load_state_dict(some.state_dict())
    else:
        some.save_pretrained(tmp_path, precision=way)
        again = KronLoraLaplace.from_pretrained(model, tmp_path)
    again.fit(DataLoader(data[2:3], batch_size=2), override=False)
    again.merge([rest])
    tolerance = 1e-2 if way == "half" else 1e-9
    assert_near(again.log_marginal_likelihood(), whole.log_marginal_likelihood(), tolerance)
    frequencies = (la.H_facs.kfacs[0][1].sums for la in (again, whole))
    assert_near(*frequencies, 1e-12)  # which are not rounded


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("rank", [3, None])
def test_more_data_are_added_to_what_an_earlier_version_saved(
    rank, corrected, tmp_path, monkeypatch
):
    """It kept the frequencies like any other side."""
    model = embedded("bert")
    options = {"factor_rank": rank, "low_rank_threshold": 20, "eigenvalue_correction": corrected}
    old = KronLoraLaplace(model, "classification", **options)
    with monkeypatch.context() as patch:
        patch.setattr(KfacRows, "have_diagonal_sum", lambda *_: False)
        old.fit(loader())
        whole = KronLoraLaplace(model, "classification", **options)
        whole.fit(loader())
        whole.fit(loader(seed=5), override=False)
    old.save_pretrained(tmp_path, precision="exact")
    new = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(new(token_batch((3, 2))), old(token_batch((3, 2))))
    new.fit(loader(seed=5), override=False)
    if rank and corrected:  # another basis than the sketch's, for the data that were added
        assert abs(new.H.tables[0].sum() - whole.H.tables[0].sum()) < 1e-9 * whole.H.tables[0].sum()
    else:
        assert_near(new.log_marginal_likelihood(), whole.log_marginal_likelihood(), 1e-9)


def test_files_say_how_little_memory_it_takes(tmp_path):
    la = KronLoraLaplace(embedded("bert"), "classification", modules=["lora_embedding_A"])
    la.fit(loader())
    la.save_pretrained(tmp_path)
    r = la.engine.blocks[0].parameter.shape[0]
    size = describe(tmp_path)["size"]["memory when loaded, about, MiB"]
    assert size == 4 * (2 * r**2 + VOCABULARY) / 2**20


def test_means_of_unit_vectors_have_no_diagonal_sum():
    options = {"factor_rank": None, "backend_kwargs": {"kfac_approx": "reduce"}}
    la = KronLoraLaplace(embedded("bert"), "classification", **options)
    la.fit(loader())
    kfacs = dict(zip(la.block_names, la.H_facs.kfacs, strict=True))
    matrix = next(X[1].matrix for name, X in kfacs.items() if "lora_embedding_A" in name)
    batch = token_batch(LENGTHS)
    units = F.one_hot(batch["input_ids"], VOCABULARY).double()
    units[..., PAD] = 0
    means = units.sum(1) / batch["attention_mask"].sum(1, keepdim=True)
    assert_near(matrix, means.T @ means / len(LENGTHS))


def test_positions_have_no_batch_and_are_refused_by_name():
    model = peft_model("bert", target_modules=["position_embeddings"])
    with pytest.raises(RuntimeError, match=r"position_embeddings' received an input of shape"):
        KronLoraLaplace(model, "classification").fit(loader())
