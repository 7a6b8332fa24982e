"""On an accelerator, the figures of the CPU: `pytest -m gpu -n 0`.

Without one, ``LAPLACE_LORA_TEST_DEVICE=cpu`` rehearses the calls.
"""

import os
from copy import deepcopy

import pytest
import torch
from benchmarks.harness.quantised import quantise_4bit
from laplace import Laplace, marglik_training
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraGGN,
    LowRankLoraLaplace,
)
from laplace_lora.evaluation import MAP, TemperatureScaling, evaluate
from laplace_lora.generation import generate, score
from laplace_lora.linalg.row_products import products_of_rows
from laplace_lora.linalg.sketch import LowRankFactor
from support.batches import loader, token_batch, validation
from support.language import text_batch, text_loader
from support.models import TARGETS, excite, peft_model

REHEARSAL = os.environ.get("LAPLACE_LORA_TEST_DEVICE")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.accelerator.is_available() and REHEARSAL is None, reason="no accelerator"
    ),
]
DEVICE = torch.device(REHEARSAL or torch.accelerator.current_accelerator() or "cpu")
BATCH = token_batch((4, 6, 3))
CLASSES = {
    "kron": lambda model: KronLoraLaplace(model, "classification"),
    "low-rank kron": lambda model: KronLoraLaplace(
        model, "classification", factor_rank=2, low_rank_threshold=4
    ),
    "eigenvalue-corrected": lambda model: KronLoraLaplace(
        model, "classification", eigenvalue_correction=True
    ),
    "diagonal": lambda model: DiagLoraLaplace(model, "classification"),
    "exact": lambda model: FullLoraLaplace(model, "classification"),
    "sketched": lambda model: LowRankLoraLaplace(model, "classification"),
    "last layer": lambda model: KronLoraLLLaplace(model, "classification"),
    "last layer, full": lambda model: FullLoraLLLaplace(model, "classification"),
}


def moved(batch, device=DEVICE):
    return {key: value.to(device) for key, value in batch.items()}


def same(ours, theirs, tolerance=1e-8):
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=tolerance, atol=tolerance)


def pair(make, name="bert", dtype=torch.float64):
    """The same posterior on the CPU and on the accelerator, before a fit."""
    model = peft_model(name, dtype=dtype)
    return make(model), make(deepcopy(model).to(DEVICE))


@pytest.mark.parametrize("kind", CLASSES)
def test_fit_tune_predict_and_load_across(kind, tmp_path):
    model = peft_model("bert")
    here = CLASSES[kind](model)
    there = CLASSES[kind](deepcopy(model).to(DEVICE))
    for la in (here, there):
        la.fit(loader())  # of the CPU: batches are moved
        la.optimize_prior_precision(pred_type="glm", method="marglik")
    same(there.prior_precision, here.prior_precision, 1e-6)
    same(there.log_marginal_likelihood(), here.log_marginal_likelihood())
    same(there(BATCH), here(BATCH), 1e-6)
    assert there(BATCH).device.type == DEVICE.type
    there.save_pretrained(tmp_path)
    loaded = type(here).from_pretrained(model, tmp_path)
    same(loaded(BATCH), here(BATCH), 1e-6)


def test_default_tuning_and_calibration():
    here, there = pair(CLASSES["kron"])
    for la in (here, there):
        la.fit(loader())
        la.optimize_prior_precision()
        la.calibrate(validation())
    same(there(BATCH), here(BATCH), 1e-5)
    reports = [evaluate(la, validation()) for la in (here, there)]
    assert reports[0]["NLL"] == pytest.approx(reports[1]["NLL"], abs=1e-5)


def test_baselines():
    model = peft_model("bert")
    logits = LogitsModel(model), LogitsModel(deepcopy(model).to(DEVICE))
    batches = BATCH, moved(BATCH)
    for method in (MAP, lambda m: TemperatureScaling(m, validation())):
        ours, theirs = (method(m)(batch) for m, batch in zip(logits, batches, strict=True))
        same(ours, theirs, 1e-6)


def test_plain_laplace_takes_the_backend():
    def plain(model):
        return Laplace(
            LogitsModel(model),
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
            backend=LoraGGN,
        )

    model = peft_model("bert")
    here, there = plain(model), plain(deepcopy(model).to(DEVICE))
    # laplace-torch moves labels only.
    here.fit(loader())
    there.fit(MovingLoader())
    same(there.log_marginal_likelihood(), here.log_marginal_likelihood())


class MovingLoader:
    """A loader that puts its batches on the accelerator, as laplace-torch's own fit needs."""

    def __init__(self):
        self.loader = loader()
        self.dataset = self.loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return map(moved, self.loader)


def test_language_models_are_fitted_scored_and_continued():
    def make(model):
        return KronLoraLaplace(
            model, "language_modeling", prior_precision=30.0, backend_kwargs={"stochastic": False}
        )

    here, there = pair(make, "llama-lm")
    for la in (here, there):
        la.fit(text_loader())
    texts = text_batch()
    exact = [score(la, texts, 4, method="exact") for la in (here, there)]
    same(exact[1].log_prob, exact[0].log_prob, 1e-6)
    generators = [torch.Generator(d).manual_seed(0) for d in ("cpu", DEVICE)]
    drawn = [
        score(la, texts, 4, n_samples=4096, generator=g)
        for la, g in zip((here, there), generators, strict=True)
    ]
    same(drawn[1].log_prob, drawn[0].log_prob, 0.05)  # other random numbers
    for la in (here, there):
        tokens = generate(la, texts["input_ids"][:1], 3, 4, n_samples=4)
        assert tokens.tokens.shape[-1] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_near_single(dtype):
    model = peft_model("llama-lm", dtype=torch.float32)
    half = deepcopy(model)
    for name, parameter in half.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(dtype)
    posteriors = []
    for each in (model, half.to(DEVICE)):
        la = KronLoraLaplace(each, "classification", target_ids=TARGETS)
        la.fit(loader())
        posteriors.append(la)
    same(posteriors[1](BATCH).float(), posteriors[0](BATCH), 0.05)


def test_autocast():
    here, there = pair(
        lambda m: KronLoraLaplace(m, "classification", target_ids=TARGETS),
        "llama-lm",
        torch.float32,
    )
    here.fit(loader())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        there.fit(loader())
        probabilities = there(BATCH)
    same(probabilities.float(), here(BATCH), 0.05)


def test_marginal_likelihood_training_runs():
    model = LogitsModel(peft_model("bert", dtype=torch.float32).to(DEVICE))
    *_, evidences, _ = marglik_training(
        model,
        MovingLoader(),
        hessian_structure="kron",
        backend=LoraGGN,
        n_epochs=2,
        marglik_frequency=1,
        n_hypersteps=2,
        optimizer_kwargs={"lr": 1e-3},
    )
    assert evidences and all(map(torch.isfinite, map(torch.as_tensor, evidences)))


def test_four_bit_base():
    pytest.importorskip("bitsandbytes")
    if DEVICE.type != "cuda":
        pytest.skip("4-bit layers in bfloat16 are laid out for CUDA")
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    base = quantise_4bit(base, torch.bfloat16)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = excite(get_peft_model(base, LoraConfig(r=4, target_modules=targets)), 0.05)
    la = KronLoraLaplace(model, "classification", target_ids=[1, 2, 3])
    la.fit(loader())
    la.optimize_prior_precision()
    probabilities = la(BATCH)
    same(probabilities.sum(-1), torch.ones(3), 1e-5)
    J = la.backend.jacobians(moved(BATCH))[0]
    gradients = torch.autograd.grad(la.model(moved(BATCH))[1, 2], la.params)
    flat = torch.cat([g.flatten().float() for g in gradients])
    assert (J[1, 2] - flat).norm() < 0.05 * flat.norm()


def test_sketches_of_half_precision_rows_are_as_good_as_of_single():
    torch.manual_seed(0)
    X = (torch.randn(2000, 700) * torch.logspace(2, -3, 700)).to(torch.bfloat16)
    exact = X.double().T @ X.double()
    ours, theirs = (LowRankFactor.zeros(700, 64, torch.float32, d) for d in (DEVICE, "cpu"))
    ours.update(X.to(DEVICE), 0.5)
    theirs.update(X.float(), 0.5)
    same(ours.trace, exact.trace() / 2, 1e-5)
    error = (ours.sketch.cpu() - theirs.sketch).norm() / theirs.sketch.norm()
    assert error < 1e-5
    same(ours.decompose().values[:20], theirs.decompose().values[:20], 1e-3)


def test_products_of_long_rows():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 16, 4, 5000, dtype=torch.float64, generator=generator)
    same(products_of_rows(left.to(DEVICE), right.to(DEVICE)), left @ right.mT)
