"""KronLoraLaplace and DiagLoraLaplace: their names, options, samples and state."""

import pytest
import torch
from laplace import DiagLaplace, FullLaplace, KronLaplace, Laplace
from laplace.curvature import CurvlinopsGGN

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraEF, LoraGGN
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import CLASSES, DENSE, LOW, posterior
from support.references import assert_near


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


def test_shared_inputs_are_summed_once_and_count_twice():
    low = posterior(name="llama", **LOW)
    sides = [F[1] for F in low.H_facs.kfacs]
    assert len({id(side) for side in sides}) < len(sides)


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
    with pytest.raises(TypeError, match=r"takes a device, got torch.float32"):
        la.to(torch.float32)
    assert {p.dtype for p in la.params} == {torch.float64}  # nothing was moved
    assert_near(la(token_batch((4, 2))), before)
    la.to("meta")
    tensors = [value for value in vars(la).values() if isinstance(value, torch.Tensor)]
    tensors += list(la.model.parameters())
    if cls is KronLoraLaplace:
        tensors += [side.vectors for sides in la.H.blocks for side in sides]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_arguments_out_of_range():
    model = LogitsModel(peft_model("bert"))
    for kwargs, match in (
        ({"factor_rank": 0}, "factor_rank must be positive"),
        ({"residual": "some"}, "residual must be one of"),
        ({"damping": True}, "damping is not supported"),
        ({"asdl_fisher_kwargs": {"kfac_approx": "reduce"}}, "asdl_fisher_kwargs would have no"),
        ({"backend_kwargs": {"kfac_approx": "exact"}}, "kfac_approx must be one of"),
        ({"target_ids": [1, 2]}, "LogitsModel already"),
    ):
        with pytest.raises(ValueError, match=match):
            KronLoraLaplace(model, "classification", **kwargs)
    with pytest.raises(TypeError, match="backend must be LoraGGN"):
        KronLoraLaplace(model, "classification", backend=CurvlinopsGGN)
    with pytest.raises(TypeError):
        KronLoraLaplace(model, "classification", no_such_argument=1)


def test_no_backend_is_the_default_one():
    """As in laplace-torch, whose classes have None for a default."""
    la = KronLoraLaplace(peft_model("bert"), "classification", backend=None)
    assert isinstance(la.backend, LoraGGN)
