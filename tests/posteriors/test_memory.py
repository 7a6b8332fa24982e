"""The memory estimate against what is really held."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    LogitsModel,
    LowRankLoraLaplace,
)
from laplace_lora.generation import score
from laplace_lora.linalg import row_storage
from laplace_lora.structures import rows
from laplace_lora.structures import sizes as memory
from support.batches import LENGTHS, loader, token_batch
from support.exact_posteriors import ENOUGH, NEW_BATCH, exact_posterior
from support.language import EXACT, language_posterior, text_batch, text_loader
from support.models import TINY, VOCABULARY, excite, peft_model
from support.peak import peak_of
from support.posteriors import DENSE, LOW
from support.preferences import CHOSEN, pair_batch, reward_posterior, texts

BATCH = token_batch((6,) * 8)


@pytest.mark.parametrize("kwargs", [DENSE, LOW])
def test_the_curvature_is_bounded_by_what_is_held(kwargs):
    la = KronLoraLaplace(peft_model("llama", dtype=torch.float32), "classification", **kwargs)
    estimate = la.estimate_memory(BATCH)
    la.fit(loader())
    eigen = {id(side): side for sides in la.H.blocks for side in sides}.values()
    held = la.H_facs.nbytes + sum(side.vectors.nbytes for side in eigen)
    assert 0.5 * estimate.curvature < held < 1.1 * estimate.curvature


def test_it_is_of_one_batch():
    la = KronLoraLaplace(peft_model("bert", dtype=torch.float32), "classification")
    rows = loader().dataset
    listed = {name: value.tolist() for name, value in rows[0].items()}
    for data in (loader(), list(loader()), rows, None, ["a b", "c"], "a b", listed):
        kind = type(data).__name__
        with pytest.raises(TypeError, match=rf"takes one batch .* got {kind}; .*next\(iter"):
            la.estimate_memory(data)
    assert "curvature at most 0.00" in str(la.estimate_memory(next(iter(loader()))))


def test_other_structures_count_their_numbers():
    model = peft_model("bert", dtype=torch.float32)
    diag = DiagLoraLaplace(model, "classification")
    assert diag.estimate_memory(BATCH).curvature == 4 * diag.n_params
    full = FullLoraLLLaplace(model, "classification")
    assert full.estimate_memory(BATCH).curvature == 8 * full.n_params**2


def test_activations_are_those_of_the_graph_and_grow_with_the_batch():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, x):
            return self.layer(x).square()  # keeps x and the layer's output

    la = DiagLoraLaplace(LogitsModel(Squares()), "regression")
    one, many = (la.estimate_memory(torch.randn(n, 10)) for n in (1, 16))
    assert one.activations == 4 * (10 + 4)
    assert many.activations == 16 * one.activations and many.batch_size == 16
    assert many.jacobian == 2 * 4 * 16 * 4 * 40
    assert many.fit == many.predict == many.activations + many.curvature + many.jacobian


def test_advice_fits_the_need(monkeypatch):
    la = KronLoraLaplace(peft_model("bert", dtype=torch.float32), "classification")
    estimate = la.estimate_memory(BATCH)
    assert estimate.fits and "Too much" not in str(estimate)
    tight = estimate.curvature + (estimate.activations + estimate.jacobian) // 2
    monkeypatch.setattr(memory, "available", lambda device: tight)
    estimate = la.estimate_memory(BATCH)
    assert not estimate.fits and "use batches of 4" in str(estimate)
    smaller = la.estimate_memory({key: value[:4] for key, value in BATCH.items()})
    assert smaller.fits
    monkeypatch.setattr(memory, "available", lambda device: 10)
    assert "lower `factor_rank`" in str(la.estimate_memory(BATCH))
    monkeypatch.setattr(memory, "available", lambda device: estimate.curvature + 10)
    assert "shorten the inputs" in str(la.estimate_memory(BATCH))


def test_what_cannot_fit_is_refused_before_the_work(tmp_path, monkeypatch):
    la = exact_posterior()
    before = la(NEW_BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda device: 10_000)
        with pytest.raises(MemoryError, match=r"14 rows of 307 numbers .* use LowRankLoraLaplace"):
            la.fit(loader())
        with pytest.raises(MemoryError, match="28 rows"):
            la.merge([copy.deepcopy(la)])
    assert torch.equal(la(NEW_BATCH), before)
    with monkeypatch.context() as patch:
        patch.setattr(rows, "free_space", lambda storage: 10_000)
        with pytest.raises(MemoryError, match="the disk of storage="):
            exact_posterior(storage=tmp_path)
    assert row_storage.free_space(tmp_path / "not" / "there") > 10_000


def test_memory_is_estimated_before_the_fit(monkeypatch):
    la = exact_posterior(fit=False)
    with pytest.raises(ValueError, match="n_examples"):
        la.estimate_memory(NEW_BATCH)
    estimate = la.estimate_memory(NEW_BATCH, n_examples=len(LENGTHS))
    la.fit(loader())
    la(NEW_BATCH)
    held = la.rows.nbytes + sum(
        t.nbytes for t in la.fitted.state.curvature.eigenpairs(torch.ones(1).double())
    )
    assert la.rows.nbytes == 14 * la.n_params * 8 < held < estimate.curvature < 1.5 * held
    assert la.estimate_memory(NEW_BATCH).curvature == estimate.curvature
    disk = exact_posterior(fit=False, storage="disk").estimate_memory(NEW_BATCH, n_examples=7)
    assert disk.curvature == estimate.curvature - la.rows.nbytes
    low = exact_posterior(LowRankLoraLaplace, **ENOUGH)
    held = low.sketch.nbytes + low.rows.nbytes
    assert held < low.estimate_memory(NEW_BATCH).curvature < 2 * held
    monkeypatch.setattr(memory, "available", lambda device: 10)
    assert "use LowRankLoraLaplace" in str(la.estimate_memory(NEW_BATCH))
    assert "lower `rank`" in str(low.estimate_memory(NEW_BATCH))


def test_memory_is_estimated_for_pairs():
    la = reward_posterior(fit=False)
    both = la.estimate_memory(pair_batch(pad_to=(8, 8)))
    one = la.estimate_memory(texts(CHOSEN, 0, 8))
    assert both.activations > 1.5 * one.activations


def adapted(cls, rank, **sizes):
    """A model of Llama's kind with other sizes than the tiny one's."""
    torch.manual_seed(0)
    base = cls(LlamaConfig(**{**TINY, **sizes}, max_position_embeddings=64))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return excite(get_peft_model(base, LoraConfig(r=rank, target_modules=targets))).eval()


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(40,), (12, 9, 12)])
def test_a_language_models_estimate_is_what_is_taken(lengths):
    model = adapted(LlamaForCausalLM, 2, vocab_size=20_000)
    la = KronLoraLaplace(model, "language_modeling", prior_precision=1e3)
    batch = text_batch(lengths, (1,) * len(lengths))
    estimate = la.estimate_memory(batch)
    fitted = peak_of(lambda: la.fit(text_loader(len(lengths), batch)))
    assert fitted / 2 < estimate.fit < 2 * fitted
    scored = peak_of(lambda: score(la, batch))
    assert scored / 2 < estimate.predict < 2 * scored


def test_the_exact_curvature_of_a_language_model_has_columns_for_each_token():
    la = language_posterior(fit=False, **EXACT)
    drawn = language_posterior(fit=False)
    batch = text_batch()
    exact, sampled = (x.estimate_memory(batch).fit_jacobian for x in (la, drawn))
    columns = 3 * (VOCABULARY - 1)  # of three scored tokens at most
    assert exact == sampled * (3 + columns) / 4 > 0


@pytest.mark.slow
def test_a_sketchs_estimate_is_what_a_fit_takes():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_labels": 3}
    model = adapted(LlamaForSequenceClassification, 32, **sizes)
    la = LowRankLoraLaplace(model, "classification", rank=40)
    estimate = la.estimate_memory(BATCH)
    assert estimate.fit > 10 * 2**20
    fitted = peak_of(lambda: la.fit(loader()))
    assert fitted / 2 < estimate.fit < 2 * fitted
