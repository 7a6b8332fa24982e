"""LaplaceCallback never loses a training: what it checks before, and keeps after."""

import logging
import random
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, default_data_collator

from laplace_lora import FunctionalLoraLLLaplace, KronLoraLaplace, LaplaceCallback
from laplace_lora.adaptive import AdaLoraCallback, remove_pruned_triplets
from laplace_lora.storage.adapter_start import FILE, AdapterStart, start_of
from support.adalora import tiny_adalora
from support.batches import loader, token_batch
from support.models import base_model, peft_model
from support.references import assert_near
from support.sweeps import rest_slow
from test_trainer import examples, trainer_of


def trainer_with_callback(folder, model=None, callback=None, **kwargs):
    model = peft_model("bert", dtype=torch.float32) if model is None else model
    trainer = trainer_of(model, folder, **kwargs)
    trainer.add_callback(LaplaceCallback(trainer, **(callback or {})))
    return trainer, trainer.callback_handler.callbacks[-1]


def steps(trainer):
    return trainer.state.global_step


def unlabelled(count):
    return [{k: v for k, v in row.items() if k != "labels"} for row in examples(count)]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (unlabelled(4), r"eval data: a batch has no 'labels'"),
        ([], "the eval loader has no batch"),
        ({"one": examples(4), "two": unlabelled(4)}, "eval_two data: a batch has no 'labels'"),
    ],
)
def test_bad_evaluation_sets_are_refused_before_the_first_step(tmp_path, data, match):
    trainer, _ = trainer_with_callback(tmp_path, eval_dataset=data)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert steps(trainer) == 0


def test_a_training_set_smaller_than_a_batch_that_is_dropped(tmp_path):
    trainer, callback = trainer_with_callback(tmp_path)
    trainer.args.dataloader_drop_last = True
    trainer.train_dataset = examples(3)
    with pytest.raises(ValueError, match="fewer than a batch with dataloader_drop_last"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_posterior_without_predictions_is_refused_before_the_first_step(tmp_path):
    """Whatever arguments it would need, and where a function makes it."""
    match = "a FunctionalLoraLLLaplace cannot be fitted by"
    trainer = trainer_of(peft_model("bert", dtype=torch.float32), tmp_path)
    for kind in (FunctionalLoraLLLaplace, partial(FunctionalLoraLLLaplace, n_subset=4)):
        with pytest.raises(TypeError, match=match):
            LaplaceCallback(trainer, posterior=kind)

    def made(*args, **kwargs):
        return FunctionalLoraLLLaplace(*args, n_subset=4)

    trainer.add_callback(LaplaceCallback(trainer, posterior=made))
    with pytest.raises(TypeError, match=match):
        trainer.train()
    assert steps(trainer) == 0


def test_a_model_that_does_not_fit_the_likelihood(tmp_path):
    trainer, _ = trainer_with_callback(tmp_path, callback={"likelihood": "reward_modeling"})
    with pytest.raises(ValueError, match="a reward model has one output"):
        trainer.train()
    assert steps(trainer) == 0
    with pytest.raises(ValueError, match="likelihood"):
        LaplaceCallback(trainer, "counting")


@pytest.mark.parametrize("first", rest_slow([True, False], 0))
def test_ranks_that_are_cut_when_saved_go_before_the_fit(tmp_path, first):
    """Together the callbacks saved a posterior that could not be loaded, in either order."""
    model = tiny_adalora()
    trainer = trainer_of(model, tmp_path)
    trainer.args.max_steps = 16
    pair = [LaplaceCallback(trainer), AdaLoraCallback()]
    for callback in pair if first else reversed(pair):
        trainer.add_callback(callback)
    with pytest.raises(ValueError, match="cannot go with AdaLoraCallback"):
        trainer.train()
    assert steps(trainer) == 0
    model = tiny_adalora()  # as the message says
    trainer = trainer_of(model, tmp_path)
    trainer.args.max_steps = 16
    trainer.add_callback(AdaLoraCallback())
    trainer.train()
    remove_pruned_triplets(model)
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    model.save_pretrained(tmp_path / "saved")
    la.save_pretrained(tmp_path / "saved", precision="exact")
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / "saved")
    again = KronLoraLaplace.from_pretrained(loaded, tmp_path / "saved")
    assert_near(again(token_batch((4, 3))), la(token_batch((4, 3))), 1e-5)


def test_checks_leave_the_training_as_it_was(tmp_path):
    weights = []
    for checked in (False, True):
        torch.manual_seed(3)
        model = peft_model("bert", dtype=torch.float32)
        trainer = trainer_of(model, tmp_path, eval_dataset=examples(4))
        if checked:
            trainer.add_callback(LaplaceCallback(trainer, save=False))
        trainer.train()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_checks_leave_the_draws_of_collators_as_they_were(tmp_path):
    def drawing(rows):
        drawn.append((random.random(), np.random.rand()))
        return default_data_collator(rows)

    seen = []
    for checked in (False, True):
        drawn = []
        trainer = trainer_of(peft_model("bert"), tmp_path, data_collator=drawing)
        if checked:
            trainer.add_callback(LaplaceCallback(trainer, save=False))
        random.seed(0)
        np.random.seed(0)
        trainer.train()
        seen.append(drawn[2:5] if checked else drawn[:3])  # the check reads one batch ahead
    assert seen[0] == seen[1]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("place", ["fit", "optimize_prior_precision", "predict"])
def test_what_fails_after_training_loses_nothing(tmp_path, monkeypatch, caplog, strict, place):
    def fail(*args, **kwargs):
        raise RuntimeError("no luck")

    target = "__call__" if place == "predict" else place
    monkeypatch.setattr(KronLoraLaplace, target, fail)
    trainer, callback = trainer_with_callback(
        tmp_path, callback={"strict": strict}, eval_dataset=examples(4)
    )
    with caplog.at_level(logging.ERROR, logger="laplace_lora"):
        if strict:
            with pytest.raises(RuntimeError, match="no luck"):
                trainer.train()
        else:
            trainer.train()
            assert "no luck" in caplog.text
    assert steps(trainer) == 3
    assert (tmp_path / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    if place == "fit":
        assert callback.la is None and not list(tmp_path.glob("laplace*"))
        return
    again = KronLoraLaplace.from_pretrained(trainer.model, tmp_path)
    batch = token_batch((4, 2))
    assert_near(again(batch), callback.la(batch), 1e-4)


def test_several_evaluation_sets_are_scored_by_name(tmp_path):
    data = {"one": examples(4, seed=1), "two": examples(5, seed=2)}
    trainer, _ = trainer_with_callback(tmp_path, eval_dataset=data, callback={"save": False})
    trainer.train()
    logged = {k for entry in trainer.state.log_history for k in entry}
    assert {"eval_one_laplace_nll", "eval_two_map_ece"} <= logged


class SFTTrainer(Trainer):
    pass


def test_texts_are_fitted_but_not_scored(tmp_path):
    texts = [{**row, "labels": row["input_ids"]} for row in examples(6)]
    model = peft_model("llama-lm", dtype=torch.float32)
    plain = trainer_of(model, tmp_path)
    trainer = SFTTrainer(model, plain.args, train_dataset=texts, eval_dataset=texts)
    callback = LaplaceCallback(trainer, strict=True, save=False)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.la.n_data == 6


def test_nothing_is_fitted_while_hyperparameters_are_searched(tmp_path, monkeypatch):
    """Not even after trials that were cut short, and the last of which would be saved."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial)
    trainer = trainer_of(None, tmp_path, model_init=lambda: peft_model("bert", dtype=torch.float32))
    callback = LaplaceCallback(trainer, strict=True, prior_mean="start")
    trainer.add_callback(callback)
    for rate in (1e-3, 1e-2):
        with pytest.warns(UserWarning, match="searched: train once more with the best ones"):
            trainer.train(trial={"learning_rate": rate})
        assert callback.la is None and not list(tmp_path.iterdir())
    trainer.train()
    assert callback.la.n_data == 10
    KronLoraLaplace.from_pretrained(trainer.model, tmp_path)


def test_the_posterior_lies_beside_an_adapter_of_any_name(tmp_path):
    lora = LoraConfig("SEQ_CLS", r=2, target_modules=["query"])
    model = get_peft_model(base_model("bert"), lora, adapter_name="mood")
    trainer, callback = trainer_with_callback(tmp_path, model, {"strict": True})
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / "mood", is_trainable=True)
    again = KronLoraLaplace.from_pretrained(loaded.eval(), tmp_path / "mood")
    batch = token_batch((4, 2))
    assert_near(again(batch), callback.la(batch), 1e-4)
    before = AdapterStart.from_pretrained(tmp_path / "mood").vector(loaded, again.params)
    assert torch.equal(before.to(callback.la.prior_mean), callback.la.prior_mean)
    assert not list(tmp_path.glob("*.safetensors"))


def test_another_adapter_of_the_same_model_has_its_own_start(tmp_path):
    model = peft_model("bert", dtype=torch.float32)
    trainer, callback = trainer_with_callback(tmp_path, model, {"strict": True})
    trainer.train()
    model.add_adapter("b", model.peft_config["default"])
    model.set_adapter("b")
    start = start_of(model)
    trainer.train()
    assert torch.equal(callback.la.prior_mean.double(), start.vector(model, callback.la.params))
    AdapterStart.from_pretrained(tmp_path / "b").vector(model, callback.la.params)


def test_a_resumed_training_finds_the_start_where_earlier_versions_put_it(tmp_path):
    lora = LoraConfig("SEQ_CLS", r=2, target_modules=["query"])
    model = get_peft_model(base_model("bert"), lora, adapter_name="mood")
    start = start_of(model)
    trainer, _ = trainer_with_callback(tmp_path, model, {"strict": True})
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.train()
    (tmp_path / "mood" / FILE).rename(tmp_path / FILE)
    again = get_peft_model(base_model("bert"), lora, adapter_name="mood")
    trainer, callback = trainer_with_callback(tmp_path, again, {"strict": True})
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    expected = start.vector(again, callback.la.params)
    assert torch.equal(callback.la.prior_mean.double(), expected)


def test_predictions_are_of_a_data_set(tmp_path):
    trainer, callback = trainer_with_callback(tmp_path)
    trainer.train()
    for data, named in ((loader(), "a loader"), (["a b", "c"], "texts"), ("a b", "texts")):
        with pytest.raises(TypeError, match=f"takes a data set, .*got {named}; .*callback.la"):
            callback.predict(data)


def test_a_resumed_training_leaves_another_adapters_start_alone(tmp_path):
    """One that lies above, where an adapter called ``default`` has it."""
    lora = LoraConfig("SEQ_CLS", r=2, target_modules=["query"])
    start_of(get_peft_model(base_model("bert"), lora)).save_pretrained(tmp_path)
    model = get_peft_model(base_model("bert"), lora, adapter_name="mood")
    trainer = trainer_of(model, tmp_path)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.train()
    trainer, callback = trainer_with_callback(tmp_path, model, {"strict": True})
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(callback.la.prior_mean, torch.zeros(()))
