"""Language models whose adapter must be told each text's task: Poly, multitask prompt tuning."""

import pytest
import torch
from peft import LoraConfig, MultitaskPromptTuningConfig, PolyConfig, get_peft_model

from laplace_lora import DiagLoraLaplace
from laplace_lora.generation import generate, score
from support.generation import seeded
from support.language import text_batch, text_loader
from support.models import base_model, excite
from support.references import assert_near

TUNERS = {
    "poly": PolyConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        **{"r": 2, "n_tasks": 2, "n_skills": 2, "n_splits": 1},
    ),
    "prompts": MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2
    ),
}


def told(batch):
    return {**batch, "task_ids": torch.arange(len(batch["labels"])) % 2}


def fitted(tuner):
    model = excite(get_peft_model(base_model("llama-lm"), TUNERS[tuner])).double().eval()
    la = DiagLoraLaplace(model, "language_modeling", uncovered="diag", prior_precision=20.0)
    la.fit(text_loader(3, told(text_batch())))
    return la


# PEFT cannot tell positions behind a prompt, so that padding before a text is refused there.
@pytest.mark.parametrize("tuner,side", [("poly", "right"), ("prompts", "right"), ("poly", "left")])
def test_each_text_is_read_for_its_task(tuner, side):
    la = fitted(tuner)
    batch = told(text_batch(side=side))
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = la.logits_model.model(**inputs).logits[:, -labels.shape[1] : -1].log_softmax(-1)
    own = logits.gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)
    own = own[labels[:, 1:] != -100]
    found = score(la, batch, 4, n_samples=4, generator=seeded())
    assert_near(found.map_log_prob[found.mask], own, 1e-5)
    other = {**batch, "task_ids": 1 - batch["task_ids"]}
    moved = score(la, other, 4, n_samples=4, generator=seeded()).map_log_prob - found.map_log_prob
    assert (moved.abs().amax(1) > 1e-4).all(), "the task does nothing"


@pytest.mark.parametrize("tuner", TUNERS)
def test_tuning_reads_tasks_and_writing_says_that_it_does_not(tuner):
    la = fitted(tuner)
    la.optimize_prior_precision()
    assert la.prior_precision.isfinite().all() and la.tuning is not None
    prompts = {key: value[:, :2] for key, value in text_batch().items() if key != "labels"}
    prompts["task_ids"] = torch.tensor([0, 1, 0])
    with pytest.raises(
        ValueError, match=r"have \['task_ids'\], on which .* read them with `score`"
    ):
        generate(la, prompts, 2, 4)


def test_tasks_beside_prompts_of_an_adapter_without_tasks_change_nothing():
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = excite(get_peft_model(base_model("llama-lm"), config)).double().eval()
    la = DiagLoraLaplace(model, "language_modeling", prior_precision=20.0)
    la.fit(text_loader(3, told(text_batch())))
    prompts = {key: value[:, :2] for key, value in text_batch().items() if key != "labels"}
    tasks = {"task_ids": torch.tensor([0, 1, 0])}
    plain, told_too = (
        generate(la, inputs, 2, 4, generator=seeded()).tokens
        for inputs in (prompts, {**prompts, **tasks})
    )
    assert torch.equal(plain, told_too)
