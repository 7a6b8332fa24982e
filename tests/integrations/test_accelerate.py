"""Models and loaders that accelerate has prepared; several processes are in tests/data."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from transformers import Trainer

from laplace_lora import (
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LaplaceCallback,
)
from laplace_lora.evaluation import evaluate
from support.batches import loader, token_batch
from support.models import TARGETS, peft_model
from support.references import assert_near
from support.trainers import quiet

LAST_LAYER = {
    KronLoraLLLaplace: {},
    FullLoraLLLaplace: {},
    DiagLoraLLLaplace: {},
    FunctionalLoraLLLaplace: {"n_subset": 7},
}
BATCH = token_batch((4, 2), seed=3)


def posterior_of(model, data, method="auto"):
    la = KronLoraLaplace(model, "classification")
    la.fit(data)
    la.optimize_prior_precision(method=method)
    return la


@pytest.fixture
def precision(request):
    AcceleratorState._reset_state(True)
    yield request.param
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("no", 1e-6), ("bf16", 3e-2)], indirect=["precision"]
)
def test_what_is_prepared_gives_what_the_plain_model_gives(precision, tolerance):
    plain = peft_model("bert").float()
    weights = [p for p in plain.parameters() if p.requires_grad]
    data = DataLoader(loader().dataset, batch_size=2)
    # Leave-one-out takes a width or none, and half precision may tip it over.
    method = "auto" if precision == "no" else "marglik"
    expected = posterior_of(copy.deepcopy(plain), data, method)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, _, prepared = accelerator.prepare(plain, torch.optim.AdamW(weights), data)
    la = posterior_of(model, prepared, method)
    assert la.n_data == expected.n_data == 7
    assert_near(la(BATCH), expected(BATCH), tolerance)
    report = evaluate(la, prepared, bootstrap=2)
    assert report["NLL"] == pytest.approx(
        evaluate(expected, data, bootstrap=2)["NLL"], abs=tolerance
    )


@pytest.mark.parametrize("precision", ["bf16"], indirect=True)
@pytest.mark.parametrize(
    ("name", "options"), [("bert", {}), ("llama", {}), ("llama-lm", {"target_ids": TARGETS})]
)
def test_last_layers_are_those_of_the_plain_model_but_for_rounding(name, options, precision):
    """Autocast stays on in a prepared model, whose head has weights in float32."""
    plain = peft_model(name, dtype=torch.float32)
    model = Accelerator(cpu=True, mixed_precision=precision).prepare(copy.deepcopy(plain))
    for cls, more in LAST_LAYER.items():
        la, expected = (cls(m, "classification", **options, **more) for m in (model, plain))
        for posterior in (la, expected):
            posterior.fit(loader())
        evidence = expected.log_marginal_likelihood().item()
        assert la.log_marginal_likelihood().item() == pytest.approx(evidence, rel=0.01)
        assert_near(la(BATCH), expected(BATCH), 0.02)
        if cls is not FunctionalLoraLLLaplace:
            assert_near(la.weight_variance(), expected.weight_variance(), 0.02)
            with torch.no_grad():
                assert_near(la.predict(BATCH).mean, la.logits_model.eval()(BATCH), 0.01)


@pytest.mark.parametrize("precision", ["bf16"], indirect=True)
def test_a_trainer_in_half_precision_ends_with_a_last_layer_posterior(tmp_path, precision):
    model, data = peft_model("llama", dtype=torch.float32), loader().dataset
    arguments = quiet(tmp_path, max_steps=2, per_device_train_batch_size=4, bf16=True)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    callback = LaplaceCallback(trainer, posterior=FullLoraLLLaplace, strict=True)
    trainer.add_callback(callback)
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    expected = FullLoraLLLaplace(model, "classification")
    expected.fit(DataLoader(data, batch_size=4))
    expected.prior_precision = callback.la.prior_precision
    evidence = expected.log_marginal_likelihood().item()
    assert callback.la.log_marginal_likelihood().item() == pytest.approx(evidence, rel=0.01)
    assert_near(
        callback.predict(data), expected.predict(DataLoader(data, batch_size=4)).probs, 0.02
    )
