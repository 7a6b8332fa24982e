"""Curvature of independent labels: one column per output, missing labels in no sum."""

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraEF,
    LoraGGN,
    LowRankLoraLaplace,
)
from laplace_lora.capture.jacobians import side_by_side
from support.models import peft_model
from support.multilabel import (
    explicit_gradient,
    explicit_label_ggn,
    explicit_loss,
    known,
    multilabel_batch,
    multilabel_loader,
    multilabel_posterior,
)
from support.references import assert_near, looped_jacobians

BATCH = multilabel_batch()


def wrapped(name="bert", **kwargs):
    return LogitsModel(peft_model(name, **kwargs)).eval()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_full_and_diagonal_curvature_equal_a_loop_over_the_known_labels(name):
    model = wrapped(name)
    backend = LoraGGN(model, "multilabel")
    exact = explicit_label_ggn(model, BATCH)
    loss, full = backend.full(BATCH, BATCH["labels"])
    assert_near(full, exact)
    assert_near(loss, explicit_loss(model, BATCH))
    _, diagonal = backend.diag(BATCH, BATCH["labels"])
    assert_near(diagonal, exact.diag())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_kfac_factors_equal_a_loop_over_examples_labels_and_tokens(name):
    model = wrapped(name)
    backend = LoraGGN(model, "multilabel")
    _, kron = backend.kron(BATCH, BATCH["labels"], N=7)
    is_known = known(BATCH)
    sums = [[0.0, 0.0] for _ in backend.maps]
    for n, length in enumerate(BATCH["attention_mask"].sum(1).tolist()):
        calls = [[] for _ in backend.maps]
        hooks = [
            linear.module.register_forward_hook(lambda m, a, out, to=to: to.append((a[0], out)))
            for linear, to in zip(backend.maps, calls, strict=True)
        ]
        f = model({"input_ids": BATCH["input_ids"][n : n + 1, :length]})[0]
        for hook in hooks:
            hook.remove()
        p = f.sigmoid().detach()
        for linear, ((a, out),), total in zip(backend.maps, calls, sums, strict=True):
            x = a.detach().reshape(-1, a.shape[-1])
            total[1] = total[1] + x.T @ x / len(x) / 7
            for k in range(3):
                if is_known[n, k]:
                    (g,) = torch.autograd.grad(f[k], out, retain_graph=True)
                    g = g.reshape(-1, g.shape[-1]) * (p[k] * (1 - p[k])).sqrt()
                    total[0] = total[0] + g.T @ g
            assert linear.in_features == x.shape[-1]
    for block, factors in zip(backend.blocks, kron.kfacs, strict=True):
        expected = sums[block.map]
        assert_near(factors, expected[:1] if block.is_bias else expected)


def test_the_sum_of_sampled_roots_is_unbiased_and_its_output_diagonal_exact():
    torch.manual_seed(0)
    f, y = torch.randn(4, 3, dtype=torch.float64), multilabel_batch((1, 2, 3, 4))["labels"]
    objective = LoraGGN(wrapped(), "multilabel").objective
    exact = objective.root(f, y)
    sampled = objective.sampled_root(f, 20_000, y)
    outer = torch.einsum("knc,knd->ncd", sampled, sampled)
    expected = torch.einsum("knc,knd->ncd", exact, exact)
    torch.testing.assert_close(outer, expected, atol=0.01, rtol=0)
    one = objective.sampled_root(f, 1, y)[0]
    assert_near(one.square(), expected.diagonal(dim1=1, dim2=2))


def test_a_sampled_fit_has_the_exact_curvature_on_average_with_fewer_passes(monkeypatch):
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    model = wrapped()
    options = {"stochastic": True, "num_samples": 2, "verify": False}
    LoraGGN(model, "multilabel", **options).diag(BATCH, BATCH["labels"])
    assert len(passes) == 2
    monkeypatch.undo()
    torch.manual_seed(0)
    many = LoraGGN(model, "multilabel", **{**options, "num_samples": 400})
    _, diagonal = many.diag(BATCH, BATCH["labels"])
    exact = explicit_label_ggn(model, BATCH).diag()
    assert_near(diagonal, exact, 0.1)


def test_the_empirical_fisher_is_that_of_the_residuals_of_known_labels():
    model = wrapped()
    _, full = LoraEF(model, "multilabel").full(BATCH, BATCH["labels"])
    J, is_known = looped_jacobians(model, BATCH), known(BATCH)
    residual = torch.where(is_known, model(BATCH).sigmoid() - BATCH["labels"], 0).detach()
    gradients = torch.einsum("nc,ncp->np", residual, J)
    assert_near(full, gradients.T @ gradients)


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace])
def test_the_loss_gradient_comes_with_the_columns_that_are_sent_anyway(cls, monkeypatch):
    la = multilabel_posterior(cls, fit=False, backend_kwargs={"verify": False})
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    la.fit(multilabel_loader(batch_size=7))
    assert len(passes) == 3
    monkeypatch.undo()
    assert_near(la.state.loss_gradient, explicit_gradient(la.logits_model.eval(), BATCH))
    assert la.loss == pytest.approx(explicit_loss(la.logits_model, BATCH).item())


def test_every_structure_holds_the_curvature_of_the_loop():
    full = multilabel_posterior(FullLoraLaplace)
    exact = explicit_label_ggn(full.logits_model.eval(), BATCH)
    rows = torch.cat([full.curvature.matrix(i) for i in range(len(full.block_names))], dim=1)
    assert_near(rows.T @ rows, exact)
    assert_near(multilabel_posterior(DiagLoraLaplace).H, exact.diag())
    sketched = multilabel_posterior(LowRankLoraLaplace, rank=50)
    delta = torch.tensor(2.0, dtype=torch.float64)
    assert_near(sketched.log_det_ratio, full.log_det_ratio, 1e-5)
    expected = torch.logdet(torch.eye(len(exact)).double() + exact / delta)
    full.prior_precision = delta
    assert_near(full.log_det_ratio, expected)


@pytest.mark.parametrize("cls", [KronLoraLLLaplace, DiagLoraLLLaplace, FullLoraLLLaplace])
def test_last_layers_hold_that_of_the_head(cls):
    la = multilabel_posterior(cls)
    features, f = la.logits_model.eval().features(BATCH)
    p = f.sigmoid().detach()
    wide = torch.cat([features.detach(), features.new_ones(7, 1)], dim=1)
    weights = torch.where(known(BATCH), p * (1 - p), 0)
    blocks = torch.einsum("nc,ni,nj->cij", weights, wide, wide)
    if cls is FullLoraLLLaplace:
        size = features.shape[1]
        index = torch.cat([torch.arange(3 * size), 3 * size + torch.arange(3)])
        exact = torch.block_diag(*[block[:size, :size] for block in blocks])
        assert_near(la.H[: 3 * size, : 3 * size], exact)
        assert len(index) == len(la.H)
        assert_near(la.H[3 * size :, 3 * size :], blocks[:, -1, -1].diag())
    elif cls is DiagLoraLLLaplace:
        diagonals = blocks.diagonal(dim1=1, dim2=2)
        assert_near(la.H, torch.cat([diagonals[:, :-1].flatten(), diagonals[:, -1]]))
    else:
        (grad_cov, _), *_ = la.curvature.kfacs
        assert_near(grad_cov.matrix, weights.sum(0).diag())


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_padding_change_nothing(side):
    la = multilabel_posterior(name="llama", fit=False)
    la.fit(multilabel_loader(batch_size=7))
    reference = [f.matrix for factors in la.curvature.kfacs for f in factors]
    for batch_size, pad_to in ((1, None), (3, 9), (2, 13)):
        la.fit(multilabel_loader(batch_size, pad_to=pad_to, side=side))
        found = [f.matrix for factors in la.curvature.kfacs for f in factors]
        assert_near(found, reference)


def test_missing_labels_and_labels_of_other_rows_enter_nothing():
    """NaN and −100 mean the same, in whatever dtype, and an unknown example only counts as one."""
    model = wrapped()
    backend = LoraGGN(model, "multilabel")
    y = BATCH["labels"]
    _, full = backend.full(BATCH, y)
    for other in (y.nan_to_num(-100), y.nan_to_num(-100).long(), y.float()):
        assert_near(backend.full(BATCH, other)[1], full)
    some = {key: torch.cat([v[:1], v[2:]]) for key, v in BATCH.items()}
    assert_near(backend.full(some, some["labels"])[1], full)
    flipped = torch.where(known(BATCH), 1 - y, y)
    assert_near(backend.full(BATCH, flipped)[1], full)
    f, blocks = backend.engine.jacobian_blocks(BATCH)
    assert f.shape == (7, 3) and side_by_side(blocks).shape[:2] == (7, 3)
