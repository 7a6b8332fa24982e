"""KronLoraLaplace and DiagLoraLaplace: fitting, evidence, samples, number formats."""

import math

import pytest
import torch
from laplace import DiagLaplace, FullLaplace, KronLaplace, Laplace
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraEF, LoraGGN
from tiny import TARGETS, assert_near, peft_model, token_batch

LENGTHS = (3, 6, 4, 6, 1, 5, 2)
DENSE = {"factor_rank": None}
LOW = {"factor_rank": 2, "low_rank_threshold": 4}
CLASSES = [(KronLoraLaplace, DENSE), (KronLoraLaplace, LOW), (DiagLoraLaplace, {})]


def loader(batch_size=3, lengths=LENGTHS, likelihood="classification", **kwargs):
    batch = token_batch(lengths, **kwargs)
    if likelihood == "regression":
        generator = torch.Generator().manual_seed(0)
        batch["labels"] = torch.randn(len(lengths), 3, generator=generator)
    examples = [{key: value[n] for key, value in batch.items()} for n in range(len(lengths))]
    return DataLoader(examples, batch_size=batch_size)


def posterior(cls=KronLoraLaplace, name="llama-lm", dtype=torch.float64, r=2, fit=True, **kwargs):
    targets = TARGETS if name.endswith("-lm") else None
    la = cls(peft_model(name, dtype=dtype, r=r), "classification", target_ids=targets, **kwargs)
    if fit:
        la.fit(loader())
    return la


@pytest.mark.parametrize(
    "cls,plain,kwargs", [(KronLoraLaplace, KronLaplace, DENSE), (DiagLoraLaplace, DiagLaplace, {})]
)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_dense_posteriors_equal_laplace_torchs(cls, plain, kwargs, likelihood):
    model = LogitsModel(peft_model("bert"))
    prior = torch.linspace(0.5, 3, 10)
    options = {"prior_precision": prior, "temperature": 0.7}
    if likelihood == "regression":
        options["sigma_noise"] = 0.6
    ours = cls(model, likelihood, **kwargs, **options)
    theirs = plain(model, likelihood, backend=LoraGGN, **options)
    assert ours.n_layers == len(prior)
    for la in (ours, theirs):
        la.fit(loader(likelihood=likelihood))
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood().double(), 1e-6)
    batch = token_batch((4, 4), seed=3)
    assert_near(
        list(ours._glm_predictive_distribution(batch)),
        list(theirs._glm_predictive_distribution(batch)),
    )
    vector = torch.randn(ours.n_params, dtype=torch.float64)
    assert_near(ours.log_prob(vector), theirs.log_prob(vector), 1e-6)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_by_name_through_laplace(cls, kwargs):
    structure = cls._key[1]
    model = LogitsModel(peft_model("bert"))
    la = Laplace(
        model, "classification", subset_of_weights="lora", hessian_structure=structure, **kwargs
    )
    assert type(la) is cls
    for name, plain in (("kron", KronLaplace), ("diag", DiagLaplace), ("full", FullLaplace)):
        other = Laplace(
            model,
            "classification",
            subset_of_weights="all",
            hessian_structure=name,
            backend=LoraGGN,
        )
        assert type(other) is plain


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_the_fit_does_not_depend_on_batches_and_padding(cls, kwargs):
    reference = posterior(cls, **kwargs)
    batch = token_batch((4, 2), seed=9)
    for data in (loader(1), loader(7), loader(2, pad_to=11, side="left"), loader(5, pad_to=9)):
        la = posterior(cls, fit=False, **kwargs)
        la.fit(data)
        assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
        assert_near(la(batch), reference(batch))


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_fitting_on_parts_equals_fitting_on_the_whole(cls, kwargs):
    whole = posterior(cls, **kwargs)
    parts = posterior(cls, fit=False, **kwargs)
    examples = loader().dataset
    parts.fit(DataLoader(examples[:2], batch_size=2), override=False)
    parts.fit(DataLoader(examples[2:], batch_size=2), override=False)
    assert parts.n_data == whole.n_data == len(LENGTHS)
    assert_near(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert_near(parts(token_batch((4, 2))), whole(token_batch((4, 2))))
    parts.fit(loader())
    assert parts.n_data == len(LENGTHS)
    assert_near(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())


def test_a_factor_rank_that_suffices_equals_dense():
    """One example of two tokens: every side has rank two at most, or one a class and token."""
    data = loader(1, lengths=(2,))
    dense, low = (
        posterior(fit=False, **kwargs)
        for kwargs in (DENSE, {"factor_rank": 6, "low_rank_threshold": 20})
    )
    for la in (dense, low):
        la.fit(data)
    assert any(side.multiplicity for sides in low.H.blocks for side in sides)
    assert_near(low.log_marginal_likelihood(), dense.log_marginal_likelihood())
    batch = token_batch((4, 2), seed=4)
    assert_near(
        list(low._glm_predictive_distribution(batch)),
        list(dense._glm_predictive_distribution(batch)),
    )


def test_rank_threshold_and_residual_change_the_posterior():
    batch = token_batch((4, 2), seed=4)
    variances = [
        posterior(**kwargs)._glm_predictive_distribution(batch)[1]
        for kwargs in (DENSE, LOW, {**LOW, "residual": "zero"}, {**LOW, "factor_rank": 1})
    ]
    for i, one in enumerate(variances):
        for other in variances[i + 1 :]:
            assert (one - other).norm() > 1e-6 * one.norm()
    assert variances[2].diagonal(dim1=1, dim2=2).sum() > variances[1].diagonal(dim1=1, dim2=2).sum()


def test_backend_arguments_reach_the_backend():
    reference = posterior(**DENSE).log_marginal_likelihood()
    for kwargs in ({"backend": LoraEF}, {"backend_kwargs": {"kfac_approx": "reduce"}}):
        assert abs(posterior(**DENSE, **kwargs).log_marginal_likelihood() - reference) > 1e-3


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_evidence_equals_its_definition(cls, kwargs):
    la = posterior(cls, prior_precision=0.4, temperature=2.0, prior_mean=0.1, **kwargs)
    P = la.posterior_precision
    matrix = P.diag() if isinstance(P, torch.Tensor) else P.to_matrix()
    gap = la.mean - 0.1
    expected = (
        -la.loss / 2.0
        - 0.5 * 0.4 * gap @ gap
        - 0.5 * (matrix.logdet() - la.n_params * math.log(0.4))
    )
    assert_near(la.log_marginal_likelihood(), expected)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_evidence_is_differentiable_in_prior_and_noise(cls, kwargs):
    la = cls(peft_model("bert"), "regression", **kwargs)
    la.fit(loader(likelihood="regression"))
    prior = torch.full((la.n_layers,), 0.7, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (prior, noise))


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_the_marginal_likelihood_tunes_the_prior(cls, kwargs, structure):
    la = posterior(cls, **kwargs)
    before = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(prior_structure=structure, n_steps=200)
    assert len(la.prior_precision) == (1 if structure == "scalar" else la.n_layers)
    assert not la.prior_precision.requires_grad
    after = la.log_marginal_likelihood()
    assert after > before
    for factor in (0.8, 1.25):
        assert la.log_marginal_likelihood(la.prior_precision * factor) < after
        la.prior_precision = la.prior_precision / factor


def test_the_evidence_does_not_drown_in_directions_without_data():
    """In single precision log det P − log det P₀ would cancel; summed as log1p it does not."""
    double = posterior(**DENSE, prior_precision=1e4)
    single = posterior(**DENSE, prior_precision=1e4, dtype=torch.float32)
    assert single.log_det_ratio.item() == pytest.approx(double.log_det_ratio.item(), rel=1e-3)
    assert 0 < single.log_det_ratio.item() < 1


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_samples_have_the_posteriors_moments(cls, kwargs):
    la = posterior(cls, name="bert", r=1, prior_precision=2.0, **kwargs)
    generator = torch.Generator().manual_seed(0)
    samples = la.sample(4000, generator=generator)
    assert samples.shape == (4000, la.n_params)
    P = la.posterior_precision
    variance = 1 / P if isinstance(P, torch.Tensor) else P.diag(exponent=-1)
    assert_near(samples.mean(0), la.mean, 0.05)
    assert_near(samples.var(0), variance, 0.1)
    again = la.sample(4000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples, again, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_numbers_are_kept_in_single_precision_or_better(cls, kwargs, dtype):
    la = posterior(cls, dtype=dtype, prior_precision=0.123456789, **kwargs)
    assert {p.dtype for p in la.model.parameters()} == {dtype}
    numbers = [la.prior_precision, la.prior_mean, la.mean, la.sigma_noise]
    numbers += [la.H] if cls is DiagLoraLaplace else [x for X in la.H.eigenvectors for x in X]
    assert {number.dtype for number in numbers} == {torch.float32}
    assert la.log_marginal_likelihood().dtype in (torch.float32, torch.float64)
    reference = posterior(cls, dtype=torch.float64, prior_precision=0.123456789, **kwargs)
    evidence, exact = (
        la.log_marginal_likelihood().item(),
        reference.log_marginal_likelihood().item(),
    )
    assert evidence == pytest.approx(exact, rel=0.02 if dtype == torch.bfloat16 else 1e-4)
    batch = token_batch((4, 2), seed=9)
    for link in ("probit", "mc"):
        probabilities = la(batch, link_approx=link, generator=torch.Generator().manual_seed(0))
        assert probabilities.dtype == torch.float32
        exact = reference(batch, link_approx="probit").float()
        torch.testing.assert_close(probabilities, exact, atol=0.1 if link == "mc" else 0.02, rtol=0)


def test_a_bfloat16_base_with_float32_adapters():
    model = peft_model("llama-lm", dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    la = KronLoraLaplace(model, "classification", target_ids=TARGETS, **LOW)
    la.fit(loader())
    la.optimize_prior_precision(n_steps=5)
    reference = posterior(dtype=torch.float32, **LOW)
    reference.optimize_prior_precision(n_steps=5)
    assert la.log_marginal_likelihood().item() == pytest.approx(
        reference.log_marginal_likelihood().item(), rel=0.02
    )


def test_shared_inputs_are_summed_once_and_count_twice():
    low = posterior(name="llama", **LOW)
    sides = [F[1] for F in low.H_facs.kfacs]
    assert len({id(side) for side in sides}) < len(sides)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_fit_leaves_modes_weights_and_gradients_alone(cls, kwargs):
    la = posterior(cls, fit=False, **kwargs)
    la.model.train()
    frozen = la.model.model.get_submodule("base_model.model.model.layers.0.mlp")
    frozen.eval()
    for p in la.params:
        p.grad = torch.ones_like(p)
    modes = [module.training for module in la.model.modules()]
    weights = parameters_to_vector(la.model.parameters()).clone()
    la.fit(loader())
    la(token_batch((4, 2)))
    la(token_batch((4, 2)), pred_type="nn", link_approx="mc", n_samples=2)
    assert [module.training for module in la.model.modules()] == modes
    torch.testing.assert_close(parameters_to_vector(la.model.parameters()), weights, rtol=0, atol=0)
    assert all((p.grad == 1).all() for p in la.params)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in la.model.modules())


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_state_dicts_restore_the_posterior(cls, kwargs):
    la = posterior(cls, prior_precision=3.0, **kwargs)
    la.covariance_scale, la.likelihood_temperature = 2.0, 1.5
    other = posterior(cls, fit=False, **kwargs)
    other.load_state_dict(la.state_dict())
    batch = token_batch((4, 2), seed=9)
    torch.testing.assert_close(other(batch), la(batch), rtol=0, atol=0)
    torch.testing.assert_close(
        other.log_marginal_likelihood(), la.log_marginal_likelihood(), rtol=0, atol=0
    )


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_moving_to_a_device_moves_everything(cls, kwargs):
    la = posterior(cls, **kwargs)
    before = la(token_batch((4, 2)))
    assert la.to("cpu") is la
    assert_near(la(token_batch((4, 2))), before)
    la.to("meta")
    tensors = [value for value in vars(la).values() if isinstance(value, torch.Tensor)]
    tensors += list(la.model.parameters())
    if cls is KronLoraLaplace:
        tensors += [side.vectors for sides in la.H.blocks for side in sides]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_progress_is_shown_on_request(capsys):
    la = posterior(fit=False)
    la.fit(loader())
    assert not capsys.readouterr().err
    la.fit(loader(), progress_bar=True)
    assert "Fitting the posterior" in capsys.readouterr().err


def test_pairs_of_tensors_are_batches_too():
    batch = token_batch((5,) * 6)
    pairs = torch.utils.data.TensorDataset(batch["input_ids"], batch["labels"])
    la = posterior(name="bert", fit=False)
    la.fit(DataLoader(pairs, batch_size=4))
    reference = posterior(name="bert", fit=False)
    reference.fit(loader(4, lengths=(5,) * 6))
    assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())


def test_regression_targets_may_be_flat():
    la = KronLoraLaplace(peft_model("bert", num_labels=1), "regression")
    batch = token_batch((5,) * 4)
    flat = [dict({k: v[n] for k, v in batch.items()}, labels=float(n)) for n in range(4)]
    la.fit(DataLoader(flat, batch_size=2))
    mean, variance = la(batch)
    assert mean.shape == (4, 1) and variance.shape == (4, 1, 1)
    assert la.n_outputs == 1
