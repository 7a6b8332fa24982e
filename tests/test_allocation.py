"""AdaLoRA's budget met at every mask, and adapters that shrink without changing the function."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_posterior import loader

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.adaptive import (
    IVON,
    PosteriorScore,
    SensitivityScore,
    adalora_to_lora,
    prune_adapter,
    remove_pruned_triplets,
    set_importance_score,
)
from laplace_lora.adaptive.allocation import adalora_components
from tiny import adalora_model, adapter_config, assert_near, base_model, peft_model, token_batch

SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 3, "total_step": 16}
ARCHITECTURES = ["llama", "bert", "deberta"]


def layers_of(model):
    return adalora_components(model.base_model.model, "default")


def kept(model):
    return sum(int((layer.E != 0).sum()) for layer in layers_of(model))


def tiny_adalora(name="bert", dtype=torch.float32, **kwargs):
    model = adalora_model(name, dtype=dtype, **{**SCHEDULE, **kwargs})
    with torch.no_grad():
        for layer in layers_of(model):
            layer.E.add_(1.0)
    return model


def training(model, optimizer, steps, check=lambda step: None):
    torch.manual_seed(0)
    for step in range(steps):
        batch = token_batch((4, 3, 5), seed=step)
        if isinstance(optimizer, IVON):
            with optimizer.sampled_params(train=True):
                model(**batch).loss.backward()
        else:
            model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        check(step)
        optimizer.zero_grad()


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


def pruned_adalora(keep=(0, 1, 3, 4), name="bert", dtype=torch.float64):
    model = tiny_adalora(name, dtype).eval()
    with torch.no_grad():
        for layer, count in zip(layers_of(model), keep, strict=True):
            layer.E[torch.tensor([2, 0, 3, 1])[count:]] = 0
    return model


def logits(model):
    with torch.no_grad():
        return LogitsModel(model)(token_batch((4, 3, 5)))


def test_removing_pruned_triplets_changes_no_logit(tmp_path):
    model = pruned_adalora()
    before = logits(model)
    objects = [p for layer in layers_of(model) for p in layer.parameters]
    ranks = remove_pruned_triplets(model)
    assert sorted(ranks.values()) == [0, 1, 3, 4]
    assert_near(logits(model), before, 1e-12)
    assert [p for layer in layers_of(model) for p in layer.parameters] == objects
    assert [len(layer.A) for layer in layers_of(model)] == list(ranks.values())
    assert remove_pruned_triplets(model) == ranks
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert").double(), tmp_path).eval()
    assert_near(logits(loaded), before, 1e-6)  # PEFT keeps float32 in memory


def test_shrinking_in_two_steps_keeps_the_pattern_of_the_original_ranks(tmp_path):
    model = pruned_adalora((2, 4, 4, 4))
    remove_pruned_triplets(model)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.E[0] = 0
    before = logits(model)
    assert list(remove_pruned_triplets(model).values()) == [1, 3, 3, 3]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert").double(), tmp_path).eval()
    assert_near(logits(loaded), before, 1e-6)


def test_an_optimiser_goes_on_after_shrinking():
    straight = tiny_adalora(dtype=torch.float64)
    results = []
    for shrink in (False, True):
        model = copy.deepcopy(straight)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        set_importance_score(model, SensitivityScore())
        training(model, optimizer, 15)
        if shrink:
            remove_pruned_triplets(model, optimizer)
            state = optimizer.state[layers_of(model)[0].A]["exp_avg"]
            assert state.shape == layers_of(model)[0].A.shape
        batch = token_batch((4, 3, 5), seed=99)
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(15)
        results.append(logits(model.eval()))
    # Only the orthogonality penalty, which sees pruned vectors too, differs.
    assert (results[0] - results[1]).norm() < 0.05 * results[0].norm()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_adalora_becomes_lora_exactly(name, tmp_path):
    model = tiny_adalora(name, torch.float64).eval()
    with torch.no_grad():
        layers_of(model)[0].E.zero_()
        layers_of(model)[1].E[1] = 0
    before = logits(model)
    head = [p.detach().clone() for n, p in model.named_parameters() if "modules_to_save" in n]
    lora = adalora_to_lora(model).eval()
    assert_near(logits(lora), before, 1e-9)
    kept_head = [p for n, p in lora.named_parameters() if "modules_to_save" in n]
    assert len(head) == len(kept_head)
    assert all(torch.equal(a, b) for a, b in zip(head, kept_head, strict=True))
    assert {type(m).__name__ for m in lora.modules() if hasattr(m, "lora_A")} == {"Linear"}
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(name).double(), tmp_path).eval()
    assert_near(logits(loaded), before, 1e-6)
    la = KronLoraLaplace(lora, "classification")
    la.fit(loader())
    assert la(token_batch((3, 3))).isfinite().all()


def test_a_wholly_pruned_adapter_cannot_become_lora():
    model = tiny_adalora()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.E.zero_()
    with pytest.raises(ValueError, match="no adapter would be left"):
        adalora_to_lora(model)


def fitted(model):
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    return la


@pytest.mark.parametrize("rslora", [False, True])
def test_pruning_a_lora_adapter_keeps_the_best_components(rslora, tmp_path):
    config = adapter_config("bert", r=4, use_rslora=rslora)
    config.modules_to_save = None
    model = get_peft_model(base_model("bert"), config).double().eval()
    generator = torch.Generator().manual_seed(0)
    layers = [(n, m) for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    strong = {0: [], 1: [2], 2: [0, 3], 3: [0, 1, 2]}
    with torch.no_grad():
        for i, (_, layer) in enumerate(layers):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for p in (A, B):
                p.copy_(1e-6 * torch.randn(p.shape, generator=generator))
            for k in strong[i]:
                A[k] = torch.randn(A.shape[1], generator=generator)
                B[:, k] = torch.randn(B.shape[0], generator=generator)
    before = logits(model)
    la = fitted(model)
    ranks = prune_adapter(model, la, 1.5, "magnitude")
    assert list(ranks.values()) == [0, 1, 2, 3]
    assert_near(logits(model), before, 1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert").double(), tmp_path).eval()
    assert_near(logits(loaded), logits(model), 1e-6)
    assert fitted(model).n_params < la.n_params


@pytest.mark.parametrize("criterion", ["snr_magnitude", "pruning_cost", lambda mean, std: -std])
def test_pruning_an_adalora_adapter(criterion):
    model = tiny_adalora(dtype=torch.float64).eval()
    ranks = prune_adapter(model, fitted(model), 2, criterion)
    assert sum(ranks.values()) == 8 == kept(model)
    assert [len(layer.A) for layer in layers_of(model)] == list(ranks.values())
    pattern = model.peft_config["default"].rank_pattern
    assert [sum(keep) for keep in pattern.values()] == list(ranks.values())
    assert la_runs(model)


def la_runs(model):
    return bool(fitted(model)(token_batch((3, 2))).isfinite().all())


def test_pruning_refuses_what_it_cannot_do():
    model = peft_model("bert")
    la = fitted(model)
    for target in (-1, 3):
        with pytest.raises(ValueError, match="there are 8 components"):
            prune_adapter(model, la, target)
    with pytest.raises(ValueError, match="does not cover the adapter of layer"):
        prune_adapter(peft_model("bert"), la, 1)
    biased = peft_model("bert", lora_bias=True)
    with pytest.raises(ValueError, match="cannot shrink"):
        prune_adapter(biased, fitted(biased), 1)


def test_deberta_is_detected_by_the_curvature():
    """It calls its query and key projections on content and, without a batch, on positions."""
    model = adalora_model("deberta")
    with pytest.raises(RuntimeError, match=r"(query|key)_proj' ran [23] times"):
        fitted(model)
