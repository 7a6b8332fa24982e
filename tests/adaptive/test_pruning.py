"""Adapters that shrink without changing the function."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from laplace_lora import FullLoraLLLaplace, KronLoraLaplace, LogitsModel
from laplace_lora.adaptive import (
    IVON,
    SensitivityScore,
    adalora_to_lora,
    prune_adapter,
    remove_pruned_triplets,
    set_importance_score,
)
from laplace_lora.adaptive.allocation import pattern_from_zeros
from laplace_lora.adaptive.lora_components import lora_components, shrink_lora
from support.adalora import kept, layers_of, tiny_adalora, training
from support.batches import loader, token_batch
from support.models import adapter_config, base_model, peft_model
from support.references import assert_near


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


def test_a_layer_without_triplets_is_recognised_once_saved(tmp_path):
    """PEFT saves no rank counts, and loads those of such layers as 0."""
    model = pruned_adalora(dtype=torch.float32)
    assert min(remove_pruned_triplets(model).values()) == 0
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path, precision="exact")
    loaded = PeftModel.from_pretrained(base_model("bert").float(), tmp_path)
    again = KronLoraLaplace.from_pretrained(loaded, tmp_path)
    assert_near(again(token_batch((4, 3))), la(token_batch((4, 3))), 1e-6)


@pytest.mark.parametrize("saved_before", [False, True])
def test_a_posterior_of_triplets_that_peft_cuts_is_pointed_out(saved_before, tmp_path):
    """It can be loaded around the model as it is, but not around the adapter that is saved."""
    model = pruned_adalora(dtype=torch.float32)
    model.peft_config["default"].rank_pattern = pattern_from_zeros(model, "default")
    if saved_before:  # which takes the adapter's name out of the pattern
        model.save_pretrained(tmp_path / "adapter")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    with pytest.warns(UserWarning, match=r"in 3 layers, .*query'.*call remove_pruned_triplets"):
        la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert_near(again(token_batch((4, 3))), la(token_batch((4, 3))), 1e-6)
    remove_pruned_triplets(model)
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    la.save_pretrained(tmp_path)  # without a warning


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


@pytest.mark.parametrize("target", [1, 2])
def test_triplets_that_were_pruned_before_use_up_no_budget(target):
    """By their widths alone they would be the most important ones; two of four live per layer."""
    model = tiny_adalora(dtype=torch.float64).eval()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.E[[0, 2]] = 0
    before = logits(model)
    ranks = prune_adapter(model, fitted(model), target, lambda mean, std: -mean.abs())
    assert sum(ranks.values()) == 4 * target == kept(model)
    assert [len(layer.A) for layer in layers_of(model)] == list(ranks.values())
    if target == 2:
        assert_near(logits(model), before, 1e-12)


def test_a_target_above_what_is_left_keeps_it():
    model = pruned_adalora()
    before = logits(model)
    assert list(prune_adapter(model, fitted(model), 3).values()) == [0, 1, 3, 4]
    assert_near(logits(model), before, 1e-12)


def la_runs(model):
    return bool(fitted(model)(token_batch((3, 2))).isfinite().all())


def test_pruning_refuses_what_it_cannot_do():
    model = peft_model("bert")
    la = fitted(model)
    for target in (-1, 2.5, float("nan"), float("inf")):
        message = f"target_r={target} must be a number from 0 to 2, .* have 8 components"
        with pytest.raises(ValueError, match=message):
            prune_adapter(model, la, target)
    with pytest.raises(ValueError, match="no component would be left with target_r=0"):
        prune_adapter(model, la, 0)
    with pytest.raises(ValueError, match="does not cover the adapter of layer"):
        prune_adapter(peft_model("bert"), la, 1)
    part = KronLoraLaplace(model, "classification", modules="lora_B|classifier")
    for other in (part, FullLoraLLLaplace(model, "classification")):
        other.fit(loader())
        with pytest.raises(ValueError, match="fit one over all adapter weights, without `modules`"):
            prune_adapter(model, other, 1)
    for criterion in (lambda mean, std: (mean / std).sum(), lambda mean, std: 1.0):
        with pytest.raises(ValueError, match=r"criterion '<lambda>' .* for each weight, .*; got"):
            prune_adapter(model, la, 1, criterion)
    biased = peft_model("bert", lora_bias=True)
    with pytest.raises(ValueError, match="cannot shrink"):
        prune_adapter(biased, fitted(biased), 1)


def lora_with_loss(**kwargs):
    """A LoRA model after a training step whose loss is still at hand, and its optimiser."""
    config = adapter_config("bert", r=4)
    config.modules_to_save = None
    model = get_peft_model(base_model("bert"), config).double()
    for seed, p in enumerate(p for n, p in model.named_parameters() if "lora_" in n):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON(trained, ess=20, betas=(0.9, 0.9), **kwargs)
    with optimizer.sampled_params(train=True):
        loss = model(**token_batch((4, 3, 5))).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, loss


def test_an_old_loss_is_no_obstacle_to_pruning():
    model, _, loss = lora_with_loss()
    objects = dict(model.named_parameters())
    ranks = prune_adapter(model, fitted(model.eval()), 2)
    assert set(ranks.values()) != {4}
    assert la_runs(model)
    new = model(**token_batch((4, 3, 5))).loss
    new.backward()
    assert loss.grad_fn is not None
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(adapters) == 2 * sum(rank > 0 for rank in ranks.values())
    for name, p in adapters.items():
        assert p is objects[name]
        assert p.grad.shape == p.shape


def test_an_old_loss_is_no_obstacle_to_an_optimiser_that_goes_on():
    model = tiny_adalora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    set_importance_score(model, SensitivityScore())
    for step in range(15):
        loss = model(**token_batch((4, 3, 5), seed=step)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    remove_pruned_triplets(model, optimizer)
    assert loss.grad_fn is not None
    layer = max(layers_of(model), key=lambda layer: len(layer.A))
    before = layer.A.detach().clone()
    model(**token_batch((4, 3, 5), seed=99)).loss.backward()
    optimizer.step()
    assert not torch.equal(layer.A, before)


def test_the_posterior_of_before_names_the_weights_that_were_pruned():
    model, _, _ = lora_with_loss()
    la = fitted(model.eval())
    prune_adapter(model, la, 2)
    with pytest.raises(RuntimeError, match=r"'.*lora_A.default.weight'.* have changed since"):
        la(token_batch((3, 2)))


def test_the_posterior_of_before_notices_that_the_whole_adapter_is_gone():
    model, _, _ = lora_with_loss()
    la = fitted(model.eval())
    for layer in lora_components(model, "default"):
        shrink_lora(model, layer, "default", torch.zeros(len(layer.A), dtype=torch.bool), None)
    with pytest.raises(RuntimeError, match="have changed since"):
        la(token_batch((3, 2)))


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_ivon_shrinks_with_the_adapter_that_it_prunes(hess_approx):
    model, optimizer, _ = lora_with_loss(hess_approx=hess_approx, hess_init=1.0)
    with optimizer.sampled_params(train=True):  # a draw that is not used yet
        model(**token_batch((4, 3, 5))).loss.backward()
    whole = {
        name: (p, *optimizer.marginals()[p], optimizer.collected[p].products)
        for name, p in model.named_parameters()
        if p in optimizer.state
    }
    ranks = prune_adapter(model, optimizer, 2)
    assert sum(ranks.values()) == 8
    current = dict(model.named_parameters())
    for name, (p, mean, std, products) in whole.items():
        if name not in current:  # its layer lost the adapter
            assert p.numel() == 0
            continue
        dim = 0 if "lora_A" in name else 1
        remaining = current[name].unbind(dim)
        stays = [any(torch.equal(old, new) for new in remaining) for old in mean.unbind(dim)]
        index = torch.tensor(stays).nonzero().view(-1)
        new_mean, new_std = optimizer.marginals()[current[name]]
        assert torch.equal(new_mean, mean.index_select(dim, index))
        assert torch.equal(new_std, std.index_select(dim, index))
        sums = optimizer.collected[current[name]]
        assert torch.equal(sums.products, products.index_select(dim, index))
    optimizer.step()


def test_drawn_weights_are_not_pruned():
    model, optimizer, _ = lora_with_loss()
    adalora = pruned_adalora()
    ivon = IVON([p for p in adalora.parameters() if p.requires_grad], ess=20)
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="restore"):
        prune_adapter(model, optimizer, 2)
    with ivon.sampled_params(), pytest.raises(RuntimeError, match="restore"):
        remove_pruned_triplets(adalora, ivon)
    assert list(remove_pruned_triplets(adalora, ivon).values()) == [0, 1, 3, 4]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_depends_on_the_ranks_is_not_pruned(start):
    """PEFT would subtract another one from the base model."""
    config = adapter_config("bert", init_lora_weights=start)
    model = get_peft_model(base_model("bert").float(), config)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', and PEFT would subtract"):
        prune_adapter(model, fitted(model), 1)


def test_an_orthogonal_start_is_no_obstacle_to_an_odd_rank(tmp_path):
    model = peft_model("bert", r=4, init_lora_weights="orthogonal").eval()
    prune_adapter(model, fitted(model), 2.75)
    assert any(rank % 2 for rank in model.peft_config["default"].rank_pattern.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("bert").double(), tmp_path)
    assert_near(logits(again), logits(model), 1e-12)


def test_a_pruned_adapter_runs_under_autocast_that_has_seen_the_whole_one():
    model = peft_model("bert", r=4, dtype=torch.float32).eval()
    la = fitted(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**token_batch())
        prune_adapter(model, la, 2)
        cached = model(**token_batch()).logits
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(model(**token_batch()).logits, cached)
