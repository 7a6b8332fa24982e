"""AdaLoRA's budget met at every mask."""

import pytest
import torch

from laplace_lora.adaptive import (
    IVON,
    PosteriorScore,
    SensitivityScore,
    adalora_to_lora,
    remove_pruned_triplets,
    set_importance_score,
)
from support.adalora import SCHEDULE, kept, layers_of, tiny_adalora, training
from support.models import peft_model

ARCHITECTURES = ["llama", "bert", "deberta"]


def optimizer_and_score(model, kind):
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(trained, lr=1e-2), SensitivityScore()
    optimizer = IVON(trained, lr=0.1, ess=20, betas=(0.9, 0.9), clip_radius=1.0, hess_init=1.0)
    return optimizer, PosteriorScore(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "ivon"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_budget_is_met_at_every_mask(name, kind, dtype):
    model = tiny_adalora(name, dtype)
    count = len(layers_of(model))
    optimizer, score = optimizer_and_score(model, kind)
    allocator = set_importance_score(model, score)
    last = SCHEDULE["total_step"] - SCHEDULE["tfinal"]
    masks = []

    def check(step):
        budget, masked = allocator.budget_schedule(step)
        if masked or step >= last:
            masks.append(step)
            assert kept(model) == budget
        if step >= last:
            assert kept(model) == SCHEDULE["target_r"] * count

    training(model, optimizer, SCHEDULE["total_step"], check)
    assert masks == [3, 6, 9, 12, 13, 14, 15]
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == SCHEDULE["target_r"] * count


def test_equal_initial_and_target_rank_keep_everything():
    model = tiny_adalora(target_r=4)
    optimizer, score = optimizer_and_score(model, "adamw")
    set_importance_score(model, score)
    training(model, optimizer, SCHEDULE["total_step"])
    assert kept(model) == 4 * len(layers_of(model))


def test_posterior_scores_are_computed_only_when_the_mask_is():
    model = tiny_adalora()
    optimizer, score = optimizer_and_score(model, "ivon")
    calls = []
    original = score.scores
    score.scores = lambda components: calls.append(1) or original(components)
    set_importance_score(model, score)
    training(model, optimizer, SCHEDULE["total_step"])
    assert len(calls) == 5  # steps 3, 6, 9, 12, and the final mask at 13


def test_scores_that_are_not_finite_stop_the_mask():
    model = tiny_adalora()
    allocator = set_importance_score(model, SensitivityScore())
    for layer in layers_of(model):
        for p in layer.parameters:
            p.grad = torch.full_like(p, torch.nan)
    allocator.update_ipt(model.base_model.model)
    with pytest.raises(FloatingPointError, match=r"an importance score of layer .* is not finite"):
        allocator.mask_to_budget(model.base_model.model, 3)
    assert kept(model) == 4 * len(layers_of(model))


def test_what_cannot_be_allocated_is_refused():
    with pytest.raises(TypeError, match="expected a PeftModel with an AdaLoRA adapter"):
        set_importance_score(peft_model("bert"), SensitivityScore())
    with pytest.raises(ValueError, match="tfinal must be at least 1"):
        set_importance_score(tiny_adalora(tfinal=0), SensitivityScore())
    with pytest.raises(ValueError, match="target_r=5 is above init_r=4"):
        set_importance_score(tiny_adalora(target_r=5), SensitivityScore())
    with pytest.raises(TypeError, match="no AdaLoRA adapter"):
        remove_pruned_triplets(peft_model("bert"))
    with pytest.raises(TypeError, match="no AdaLoRA adapter"):
        adalora_to_lora(peft_model("bert"))
