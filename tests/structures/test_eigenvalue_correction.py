"""Eigenvalue-corrected K-FAC against dense matrices from per-example Jacobians."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, KronLoraLLLaplace, LogitsModel, LoraEF
from laplace_lora.likelihoods import classification
from laplace_lora.likelihoods import roots as likelihoods
from laplace_lora.predictive.glm import Predictor
from support.batches import LENGTHS, images, loader, token_batch
from support.corrected_posteriors import (
    OPTIONS,
    ZERO,
    blocks_of,
    diagonal_part,
    exact_blocks,
    fit_corrected,
)
from support.models import adalora_model, peft_model, resnet
from support.posteriors import DENSE, LOW
from support.references import assert_near, explicit_jacobians

BATCH = token_batch((4, 2), seed=3)


def assert_is_diagonal_part(la, exact):
    residual = la.structure.spec.residual
    for sides, ours, block in zip(la.H.blocks, blocks_of(la.H), exact, strict=True):
        assert_near(ours, diagonal_part(sides, block, residual))


@pytest.mark.parametrize("kwargs", OPTIONS)
@pytest.mark.parametrize("name", ["bert", "llama-lm", "gpt2", "adalora"])
def test_eigenvalues_are_those_of_explicit_jacobians(name, kwargs):
    model = adalora_model("bert") if name == "adalora" else name
    la = fit_corrected(model, **kwargs)
    assert_is_diagonal_part(la, exact_blocks(la, token_batch(LENGTHS)))


def test_convolutions_count_their_patches():
    batch = images()
    examples = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    la = fit_corrected(LogitsModel(resnet()), data=DataLoader(examples, batch_size=3), **LOW)
    assert_is_diagonal_part(la, exact_blocks(la, batch))


def test_regression_and_the_empirical_fisher():
    data = loader(likelihood="regression")
    la = fit_corrected("bert", "regression", data=data, **LOW)
    eye = torch.eye(3, dtype=torch.float64).expand(len(LENGTHS), 3, 3)
    assert_is_diagonal_part(la, exact_blocks(la, token_batch(LENGTHS), eye))
    la = fit_corrected(backend=LoraEF, **LOW)
    batch = token_batch(LENGTHS)
    f = la.model.eval()(batch)
    gradient = likelihoods.softmax_residual(f, batch["labels"])[0]
    outer = gradient.unsqueeze(2) * gradient.unsqueeze(1)
    assert_is_diagonal_part(la, exact_blocks(la, batch, outer))


def test_a_sampled_fisher_is_corrected_by_columns_of_its_own(monkeypatch):
    options = {"backend_kwargs": {"stochastic": True}, **DENSE}
    la = fit_corrected(**options)
    before = la.H.table(0).sum()
    la.fit(loader())
    assert (la.H.table(0).sum() - before).abs() > 1e-3 * before
    calls = []

    def exact(f, num_samples):
        calls.append(num_samples)
        return likelihoods.softmax_root(f)

    monkeypatch.setattr(classification, "sampled_softmax_root", exact)
    assert_near(fit_corrected(**options)(BATCH), fit_corrected(**DENSE)(BATCH))
    assert len(calls) == 2 * len(loader())  # two passes


@pytest.mark.parametrize("kwargs", OPTIONS)
@pytest.mark.parametrize("name", ["bert", "llama-lm"])
def test_no_farther_from_the_exact_blocks_than_the_factors(name, kwargs):
    """The diagonal in a basis is the nearest of all matrices diagonal in it."""
    corrected, plain = fit_corrected(name, **kwargs), fit_corrected(name, correct=False, **kwargs)
    closer = []
    for exact, ours, theirs in zip(
        exact_blocks(corrected, token_batch(LENGTHS)),
        blocks_of(corrected.H),
        blocks_of(plain.H),
        strict=True,
    ):
        error, bound = (ours - exact).norm(), (theirs - exact).norm()
        assert error <= bound * (1 + 1e-6) + 1e-12
        closer.append(bool(error < 0.99 * bound))
    assert sum(closer) >= len(closer) // 2


def linear_net():
    torch.manual_seed(0)
    return LogitsModel(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4, bias=False)).double())


def vectors(n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    y = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return [(x[i], y[i]) for i in range(n)]


@pytest.mark.parametrize("case", ["one token", "deep linear"])
def test_exact_where_the_factors_are(case):
    if case == "one token":
        la = fit_corrected("llama-lm", data=loader(lengths=(1,)), **DENSE)
        exact = exact_blocks(la, token_batch((1,)))
    else:
        la = fit_corrected(
            linear_net(), "regression", data=DataLoader(vectors(), batch_size=4), **DENSE
        )
        x = torch.stack([x for x, _ in vectors()])
        exact = exact_blocks(la, x, torch.eye(4).double().expand(len(x), 4, 4))
    for ours, block in zip(blocks_of(la.H), exact, strict=True):
        assert_near(ours, block)
    for i, table in enumerate(la.H.tables):
        assert_near(table, la.H_facs.decompose().table(i))


@pytest.mark.parametrize("kwargs", OPTIONS)
def test_the_trace_is_that_of_the_exact_block(kwargs):
    la = fit_corrected(**kwargs)
    exact = torch.stack([block.trace() for block in exact_blocks(la, token_batch(LENGTHS))])
    found = torch.stack([sum(n * e.sum() for e, n in s) for s in la.fitted.precision.spectra()])
    if kwargs is ZERO:
        assert (found <= exact * (1 + 1e-9)).all() and (found < 0.99 * exact).any()
    else:
        assert_near(found, exact)


def test_a_factor_rank_that_suffices_equals_dense():
    data = loader(1, lengths=(2,))
    dense = fit_corrected("llama-lm", data=data, **DENSE)
    low = fit_corrected("llama-lm", data=data, factor_rank=6, low_rank_threshold=20)
    assert any(side.multiplicity for sides in low.H.blocks for side in sides)
    assert_near(low.log_marginal_likelihood(), dense.log_marginal_likelihood())
    assert_near(low(BATCH), dense(BATCH))


@pytest.mark.parametrize("kwargs", [DENSE, LOW])
def test_batches_and_padding_do_not_matter(kwargs):
    reference = fit_corrected("llama-lm", **kwargs)
    for data in (loader(1), loader(7), loader(2, pad_to=11, side="left"), loader(5, pad_to=9)):
        la = fit_corrected("llama-lm", data=data, **kwargs)
        assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
        assert_near(la(BATCH), reference(BATCH))


@pytest.mark.parametrize("kwargs", [DENSE, LOW, ZERO])
def test_everything_follows_from_the_matrix(kwargs):
    la = fit_corrected(
        r_one := peft_model("bert", r=1), prior_precision=0.7, temperature=0.8, **kwargs
    )
    assert la.logits_model.model is r_one
    matrix = la.posterior_precision.to_matrix()
    prior = 0.7 * torch.eye(la.n_params, dtype=torch.float64)
    assert_near(matrix, la._H_factor * la.H.to_matrix() + prior)
    covariance = matrix.inverse()
    assert_near(la.posterior_precision.to_matrix(-1), covariance)
    assert_near(la.weight_variance(), covariance.diagonal())
    assert_near(la.log_det_ratio, matrix.logdet() - prior.logdet())
    expected = -la.loss / 0.8 - 0.5 * (la.scatter + matrix.logdet() - prior.logdet())
    assert_near(la.log_marginal_likelihood(), expected)
    J = torch.cat([rows.flatten(2) for rows in explicit_jacobians(la.model, BATCH)], -1)
    moments = J @ covariance @ J.mT
    assert_near(la._glm_predictive_distribution(BATCH)[1], moments)
    variances = lambda _, e: 1 / (e.unsqueeze(1) + 0.7)  # noqa: E731
    _, forms = Predictor(la.fitted).forms(BATCH, classification.LOGITS, variances)
    assert_near(sum(form for _, form in forms).squeeze(-1), moments)
    noise = torch.randn(5, la.n_params, dtype=torch.float64)
    root = la.posterior_precision.bmm(noise, exponent=-0.5)
    assert_near(root @ matrix @ root.T, noise @ noise.T)
    samples = la.sample(4000, generator=torch.Generator().manual_seed(0))
    assert_near(samples.var(0), covariance.diagonal(), 0.1)


@pytest.mark.parametrize("structure", ["scalar", "matrix", "layerwise"])
def test_the_marginal_likelihood_is_maximal_where_tuning_ends(structure):
    la = fit_corrected(**LOW)
    la.optimize_prior_precision(prior_structure=structure, correction=False)
    best, prior = la.log_marginal_likelihood(), la.prior_precision
    for factor in (0.8, 1.25):
        assert la.log_marginal_likelihood(prior * factor) < best


def test_tuning_on_validation_data_sees_corrected_covariances():
    la = fit_corrected("llama-lm", **LOW)
    grid = {"grid_size": 5, "log_prior_prec_min": -3, "log_prior_prec_max": 1}
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(seed=5), **grid)
    best, losses = la.prior_precision.item(), {}
    for delta in torch.logspace(-3, 1, 5).tolist():
        la.prior_precision = delta
        losses[delta] = sum(
            -la(batch).log()[range(len(batch["labels"])), batch["labels"]].sum()
            for batch in loader(seed=5)
        )
    assert best == pytest.approx(min(losses, key=losses.get))
    la.optimize_prior_precision(method="val_gd", val_loader=loader(seed=5), n_steps=3)


@pytest.mark.parametrize("kwargs", OPTIONS)
def test_the_option_changes_the_posterior_and_nothing_else(kwargs):
    corrected, plain = (
        fit_corrected("llama-lm", correct=c, prior_precision=1e-3, **kwargs) for c in (True, False)
    )
    assert_near(corrected.H.eigenvectors[0], plain.H.eigenvectors[0], 1e-12)
    assert corrected.loss == plain.loss and corrected.n_data == plain.n_data
    one, other = (la._glm_predictive_distribution(BATCH)[1] for la in (corrected, plain))
    assert (one - other).norm() > 1e-2 * other.norm()
    assert corrected.arguments() == {**plain.arguments(), "eigenvalue_correction": True}
    held = sum(table.numel() for table in corrected.H.tables)
    estimate, cheaper = corrected.estimate_memory(BATCH), plain.estimate_memory(BATCH)
    assert estimate.fit == cheaper.fit + 8 * held + estimate.jacobian
    assert estimate.predict == cheaper.predict + 8 * held


def test_moving_to_a_device_moves_the_eigenvalues():
    la = fit_corrected(**LOW)
    assert_near(la.to("cpu")(BATCH), la(BATCH))
    la.to("meta")
    assert {table.device.type for table in la.H.tables} == {"meta"}
    assert {table.device.type for table in la.curvature.to("meta").corrected.tables} == {"meta"}


def test_single_precision_eigenvalues_of_half_precision_models():
    la = fit_corrected(peft_model("bert", dtype=torch.bfloat16), **LOW)
    assert {table.dtype for table in la.H.tables} == {torch.float32}
    assert la(BATCH).isfinite().all()


@pytest.mark.parametrize("kwargs", [{}, {"factor_rank": 2, "low_rank_threshold": 4}])
def test_the_last_layer_may_be_corrected(kwargs, tmp_path):
    la = fit_corrected(cls=KronLoraLLLaplace, **kwargs)
    last = la.model.model
    features, head = last.features(token_batch(LENGTHS)), last.head
    p = head(features).softmax(-1).detach()
    outer = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    weight = torch.einsum("ncd,na,nb->cadb", outer, features, features).reshape([3 * 16] * 2)
    for sides, ours, exact in zip(
        la.H.blocks, blocks_of(la.H), [weight, outer.sum(0)], strict=True
    ):
        assert_near(ours, diagonal_part(sides, exact))
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLLLaplace.from_pretrained(la.logits_model.model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    plain = fit_corrected(cls=KronLoraLLLaplace, correct=False, **kwargs)
    assert not torch.allclose(plain(BATCH), la(BATCH), rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"factor_rank": 4, "low_rank_threshold": 8}])
def test_batches_and_order_do_not_change_reduced_factors(kwargs):
    """Their sides have a null space in which the exact block is not zero."""
    evidences = []
    for batch_size in (1, 2, 7):
        backend = {"kfac_approx": "reduce"}
        model = peft_model("gpt2")
        la = KronLoraLaplace(
            model, "classification", eigenvalue_correction=True, backend_kwargs=backend, **kwargs
        )
        la.fit(loader(batch_size))
        evidences.append(float(la.log_marginal_likelihood()))
    assert evidences == pytest.approx(evidences[:1] * 3, rel=1e-6)
