"""A prior around the weights at the start of training."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import laplace_lora
from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LaplaceCallback,
)
from laplace_lora.storage.adapter_start import FILE, AdapterStart, start_of
from support.batches import loader, rows, token_batch
from support.models import peft_model
from support.references import assert_near
from support.sweeps import rest_slow

CLASSES = [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace]


def trained(steps=5):
    """A model, its weights before training, and the record of them."""
    model = peft_model("bert")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    start = laplace_lora.start_of(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**token_batch((3, 6, 4))).loss.backward()
        optimizer.step()
    model.zero_grad()
    return model, before, start


@pytest.mark.parametrize("cls", CLASSES)
def test_the_evidence_counts_from_the_start(cls):
    model, before, start = trained()
    la = cls(model, "classification", prior_mean=start, prior_precision=2.0)
    la.fit(loader())
    names = {id(p): name for name, p in model.named_parameters()}
    origin = torch.cat([before[names[id(p)]].flatten() for p in la.params])
    moved = la.mean - origin
    assert moved.abs().max() > 1e-2
    plain = -la.loss - 0.5 * (la.log_det_ratio + 2.0 * moved.square().sum())
    assert_near(la.log_marginal_likelihood(), plain, 1e-9)
    corrected = la.log_marginal_likelihood(correction=True) - plain
    if cls is FullLoraLaplace:
        b = -la.state.loss_gradient - 2.0 * moved
        term = 0.5 * b @ torch.linalg.solve(la.posterior_precision.to_matrix(), b)
        assert_near(corrected, term, 1e-7)
    around_zero = cls(model, "classification", prior_precision=2.0)
    around_zero.fit(loader())
    assert abs(around_zero.log_marginal_likelihood() - plain) > 1e-3
    batch = token_batch((3, 6, 4))
    assert torch.equal(la(batch), around_zero(batch))  # a prior's mean moves no prediction


def test_the_start_is_a_copy_and_comes_back_from_its_file(tmp_path):
    model, before, start = trained()
    assert all(torch.equal(start.tensors[name], tensor) for name, tensor in before.items())
    start.save_pretrained(tmp_path / "new")
    again = AdapterStart.from_pretrained(tmp_path / "new")
    la = KronLoraLaplace(model, "classification", prior_mean=again)
    other = KronLoraLaplace(model, "classification", prior_mean=start)
    assert torch.equal(la.prior_mean, other.prior_mean)
    la.fit(loader())
    la.optimize_prior_precision(method="marglik")
    la.save_pretrained(tmp_path)
    loaded = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(loaded.prior_mean, la.prior_mean)
    for correction in (False, True):
        value = la.log_marginal_likelihood(correction=correction)
        assert torch.equal(loaded.log_marginal_likelihood(correction=correction), value)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        AdapterStart.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        AdapterStart.from_pretrained(tmp_path / "nowhere")


def test_part_of_the_model():
    model, before, start = trained()
    la = KronLoraLaplace(model, "classification", prior_mean=start, modules="lora_B")
    expected = [tensor.flatten() for name, tensor in before.items() if "lora_B" in name]
    assert torch.equal(la.prior_mean, torch.cat(expected))


def test_another_models_start_is_refused():
    model, _, start = trained(steps=1)
    with pytest.raises(ValueError, match="is not known"):
        KronLoraLaplace(peft_model("bert", r=3), "classification", prior_mean=start)
    with pytest.raises(ValueError, match="has a head of its own"):
        KronLoraLLLaplace(model, "classification", prior_mean=start)
    with pytest.raises(ValueError, match="no trainable weights"):
        start_of(nn.Linear(2, 2).requires_grad_(False))


def trainer_on(folder, model, steps=2, **kwargs):
    batch = token_batch((4,) * 10)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=1
    )
    return Trainer(model, arguments, train_dataset=[rows(batch, n) for n in range(10)], **kwargs)


@pytest.mark.parametrize("options", [{}, {"prior_mean": "start"}])
def test_the_trainer_keeps_it(tmp_path, options):
    model = peft_model("bert", dtype=torch.float32)
    before = start_of(model)
    trainer = trainer_on(tmp_path, model)
    callback = LaplaceCallback(trainer, strict=True, **options)
    trainer.add_callback(callback)
    trainer.train()
    expected = before.vector(model, callback.la.params)
    assert torch.equal(callback.la.prior_mean.double(), expected)
    kept = AdapterStart.from_pretrained(tmp_path)
    assert torch.equal(kept.vector(model, callback.la.params), expected)
    loaded = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(loaded.prior_mean, callback.la.prior_mean)
    resumed = trainer_on(tmp_path, model)
    again = LaplaceCallback(resumed, strict=True, **options)
    resumed.add_callback(again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(again.la.prior_mean.double(), expected)
    (tmp_path / FILE).unlink()
    resumed = trainer_on(tmp_path, model)
    late = LaplaceCallback(resumed, strict=True, **options)
    resumed.add_callback(late)
    if options:
        with pytest.raises(FileNotFoundError):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    else:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert not late.la.prior_mean.any()


@pytest.mark.parametrize("options", rest_slow([{}, {"prior_mean": "start"}], 0))
def test_a_model_that_is_made_anew_has_a_start_of_its_own(tmp_path, options):
    made = []

    def another():
        model = peft_model("bert", dtype=torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * len(made) * p.requires_grad
        made.append(start_of(model))
        return model

    trainer = trainer_on(tmp_path, None, model_init=another)
    callback = LaplaceCallback(trainer, strict=True, **options)
    trainer.add_callback(callback)
    means = []
    for model_again in (True, True, False):
        if not model_again:
            trainer.model_init = None  # training goes on
        trainer.train()
        means.append(callback.la.prior_mean.double())
        expected = made[-1].vector(trainer.model, callback.la.params)
        assert torch.equal(means[-1], expected)
    assert not torch.equal(means[0], means[1])


@pytest.mark.parametrize(
    "posterior,options", [(KronLoraLaplace, {"prior_mean": 0.0}), (KronLoraLLLaplace, {})]
)
def test_the_trainer_leaves_it_out(tmp_path, posterior, options):
    trainer = trainer_on(tmp_path, peft_model("bert", dtype=torch.float32), steps=1)
    callback = LaplaceCallback(trainer, posterior=posterior, strict=True, **options)
    trainer.add_callback(callback)
    trainer.train()
    assert not callback.la.prior_mean.any()
    assert not (tmp_path / FILE).exists()


def test_nothing_is_written_where_nothing_is_saved(tmp_path):
    trainer = trainer_on(tmp_path, peft_model("bert", dtype=torch.float32), steps=1)
    callback = LaplaceCallback(trainer, save=False, strict=True)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.la.prior_mean.any()
    assert not (tmp_path / FILE).exists()


def test_another_runs_start_is_not_taken_where_nothing_is_saved(tmp_path):
    model = peft_model("bert", dtype=torch.float32)
    trainer = trainer_on(tmp_path, model)
    trainer.train()
    other = {name: torch.ones_like(t) for name, t in start_of(model).tensors.items()}
    AdapterStart(other).save_pretrained(tmp_path)
    resumed = trainer_on(tmp_path, model, steps=3)
    callback = LaplaceCallback(resumed, save=False, strict=True)
    resumed.add_callback(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not callback.la.prior_mean.any()


def test_the_start_of_another_adapter_that_is_loaded_is_none_of_this_one():
    model = peft_model("bert")
    of_default = start_of(model)
    model.add_adapter("b", model.peft_config["default"])
    model.set_adapter("b")
    with pytest.raises(ValueError, match=r"the start of '.*b\.weight' is not known"):
        KronLoraLaplace(model, "classification", prior_mean=of_default)
    model.delete_adapter("default")  # then it may be the same adapter under another name
    KronLoraLaplace(model, "classification", prior_mean=of_default)


def test_the_start_of_two_adapters_is_none_of_a_third():
    starts = [start_of(peft_model("bert")), start_of(renamed_adapter("b"))]
    of_two = AdapterStart(starts[0].tensors | starts[1].tensors)
    other = renamed_adapter("c")
    with pytest.raises(ValueError, match="is not known"):
        KronLoraLaplace(other, "classification", prior_mean=of_two)
    KronLoraLaplace(renamed_adapter("b"), "classification", prior_mean=of_two)


def renamed_adapter(name):
    """The model of `peft_model` with its adapter under another name."""
    model = peft_model("bert")
    model.add_adapter(name, model.peft_config["default"])
    model.set_adapter(name)
    model.delete_adapter("default")
    return model
