"""The likelihood that a trainer's loss implies, and losses that are another."""

import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    Trainer,
)

from laplace_lora import LaplaceCallback
from laplace_lora.trainer_loss import implied_likelihood
from support.models import TARGETS, TINY, bert_config, llama_config, peft_model
from test_trainer import examples, trainer_of


class RewardTrainer(Trainer):
    pass


class SFTTrainer(Trainer):
    pass


@pytest.mark.parametrize(
    ("kind", "name", "labels", "options", "likelihood"),
    [
        (Trainer, "bert", 3, {}, "classification"),
        (Trainer, "bert", 1, {}, "regression"),
        (RewardTrainer, "bert", 1, {}, "reward_modeling"),
        (SFTTrainer, "llama-lm", 3, {}, "language_modeling"),
        (Trainer, "gpt2-lm", 3, {}, "language_modeling"),
        (Trainer, "llama-lm", 3, {"target_ids": TARGETS}, "classification"),
    ],
)
def test_the_likelihood_is_what_the_trainer_trains(
    tmp_path, kind, name, labels, options, likelihood
):
    plain = trainer_of(peft_model(name, num_labels=labels, dtype=torch.float32), tmp_path)
    trainer = kind(plain.model, plain.args, train_dataset=examples(4))
    assert implied_likelihood(trainer, options) == likelihood
    assert LaplaceCallback(trainer, **options).likelihood == likelihood


@pytest.mark.parametrize(
    ("kind", "config", "likelihood"),
    [
        (LlamaForCausalLM, llama_config(), "language_modeling"),
        (BertForSequenceClassification, bert_config(num_labels=1), "regression"),
        (BertForTokenClassification, bert_config(), "token_classification"),
    ],
)
def test_models_that_were_compiled_before_they_got_adapters(kind, config, likelihood):
    adapters = LoraConfig(r=2, target_modules=["q_proj", "query"])
    model = get_peft_model(torch.compile(kind(config)), adapters)
    assert implied_likelihood(SimpleNamespace(model=model), {}) == likelihood


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


@pytest.mark.parametrize("own", ["compute_loss_func", "Weighted.compute_loss", "label_smoothing"])
def test_a_loss_of_the_trainers_own_is_pointed_out(tmp_path, own):
    trainer = trainer_of(peft_model("bert", dtype=torch.float32), tmp_path)
    if own == "compute_loss_func":
        trainer.compute_loss_func = lambda *args, **kwargs: None
    elif own == "label_smoothing":
        trainer.args.label_smoothing_factor = 0.1
    else:
        trainer.__class__ = Weighted
    with pytest.warns(UserWarning, match=f"loss is its own .{own}.*plain 'classification'"):
        LaplaceCallback(trainer)
    LaplaceCallback(trainer, "classification")


class GKDTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        raise NotImplementedError


GKDTrainer.__module__ = "trl.experimental.gkd.gkd_trainer"
ARGUMENTS = {
    "loss_type='dft'": (SFTTrainer, {"loss_type": "dft"}),
    "center_rewards_coefficient": (RewardTrainer, {"center_rewards_coefficient": 0.01}),
    "GKDTrainer.compute_loss": (GKDTrainer, {}),
}


def trl_trainer(kind, folder, arguments):
    name, labels = ("bert", 1) if kind is RewardTrainer else ("llama-lm", 3)
    plain = trainer_of(peft_model(name, num_labels=labels, dtype=torch.float32), folder)
    vars(plain.args).update(arguments)
    return kind(plain.model, plain.args, train_dataset=examples(4))


@pytest.mark.parametrize("own", ARGUMENTS)
def test_arguments_that_change_the_loss_of_trl_are_pointed_out(tmp_path, own):
    trainer = trl_trainer(ARGUMENTS[own][0], tmp_path, ARGUMENTS[own][1])
    with pytest.warns(UserWarning, match=re.escape(f"loss is its own ({own})")):
        callback = LaplaceCallback(trainer)
    LaplaceCallback(trainer, callback.likelihood)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (SFTTrainer, {"loss_type": "nll"}),
        (SFTTrainer, {"loss_type": "chunked_nll"}),
        (SFTTrainer, {"center_rewards_coefficient": 0.01}),  # another trainer's
        (RewardTrainer, {"center_rewards_coefficient": None}),
        (RewardTrainer, {"center_rewards_coefficient": 0.0}),
    ],
)
def test_arguments_that_leave_the_loss_of_trl_are_not(tmp_path, kind, arguments):
    LaplaceCallback(trl_trainer(kind, tmp_path, arguments))  # warnings are errors


@pytest.mark.parametrize(
    ("kind", "flag", "weight"),
    [
        (MixtralForCausalLM, True, 0.01),
        (MixtralForCausalLM, True, 0.0),
        (MixtralForCausalLM, False, 0.01),
        (MixtralForSequenceClassification, True, 0.01),  # whose loss leaves it out
    ],
)
def test_a_router_loss_that_the_model_adds_is_pointed_out(tmp_path, kind, flag, weight):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_labels": 3}
    routed = {"output_router_logits": flag, "router_aux_loss_coef": weight}
    base = kind(MixtralConfig(**TINY, **experts, **routed))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = trainer_of(model, tmp_path)
    if flag and weight and kind is MixtralForCausalLM:
        with pytest.warns(UserWarning, match=r"loss is its own \(output_router_logits\)"):
            LaplaceCallback(trainer)
    else:
        LaplaceCallback(trainer)  # warnings are errors
