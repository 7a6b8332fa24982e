"""The predictive: exact covariances, every link, samples that leave the model as it was."""

import pytest
import torch
from laplace import DiagLaplace, KronLaplace
from laplace.curvature import CurvatureInterface
from test_posterior import CLASSES, DENSE, LOW, loader, posterior
from torch.nn.utils import parameters_to_vector

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from tiny import ARCHITECTURES, assert_near, peft_model, token_batch

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

BATCH = token_batch((4, 2, 6), seed=9)


def explicit_covariance(la, batch):
    la.model.eval()
    jacobians, _ = CurvatureInterface.jacobians(la.backend, batch)
    P = la.posterior_precision
    covariance = (1 / P).diag() if isinstance(P, torch.Tensor) else P.to_matrix(exponent=-1)
    return torch.einsum("ncp,pq,nkq->nck", jacobians, covariance, jacobians)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_covariance_equals_explicit_jacobians(name, cls, kwargs):
    la = posterior(cls, name=name, prior_precision=0.6, **kwargs)
    mean, covariance = la._glm_predictive_distribution(BATCH)
    assert_near(mean, la.model.eval()(BATCH).detach())
    assert_near(covariance, explicit_covariance(la, BATCH))


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm"])
def test_closed_form_links_are_laplace_torchs(cls, kwargs, link):
    la = posterior(cls, name="bert", **kwargs)
    plain = {KronLoraLaplace: KronLaplace, DiagLoraLaplace: DiagLaplace}[cls]
    mean, covariance = la._glm_predictive_distribution(BATCH)
    theirs = plain(la.model, "classification", backend=LoraGGN)
    theirs._glm_predictive_distribution = lambda x, joint=False: (mean.clone(), covariance.clone())
    assert_near(la(BATCH, link_approx=link), theirs(BATCH, link_approx=link))


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_sampled_link_agrees_with_its_integral(cls, kwargs):
    la = posterior(cls, prior_precision=0.05, **kwargs)
    mean, covariance = la._glm_predictive_distribution(BATCH)
    normal = torch.distributions.MultivariateNormal(mean, covariance + 1e-9 * torch.eye(3))
    torch.manual_seed(0)
    expected = normal.sample((40_000,)).softmax(-1).mean(0)
    probabilities = la(BATCH, link_approx="mc", n_samples=40_000)
    torch.testing.assert_close(probabilities, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3).double())
    # Ignoring the covariance between logits is another integral.
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    normal = torch.distributions.MultivariateNormal(mean, diagonal)
    expected = normal.sample((40_000,)).softmax(-1).mean(0)
    probabilities = la(BATCH, link_approx="mc", n_samples=40_000, diagonal_output=True)
    torch.testing.assert_close(probabilities, expected, atol=0.01, rtol=0)


def test_binary_tasks_need_one_backward_pass_for_the_sampled_link():
    la = KronLoraLaplace(peft_model("bert", num_labels=2), "classification")
    la.fit(loader(labels=2))
    passes = []
    original = torch.autograd.grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or original(*a, **k))
        la(BATCH, link_approx="mc")
        assert len(passes) == 1
        la(BATCH, link_approx="probit")
        assert len(passes) == 3


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_generators_fix_the_samples(cls, kwargs):
    la = posterior(cls, **kwargs)
    for options in ({}, {"diagonal_output": True}, {"pred_type": "nn"}):
        options = {**options, "link_approx": "mc", "n_samples": 3}
        first, second, other = (
            la(BATCH, generator=torch.Generator().manual_seed(seed), **options)
            for seed in (0, 0, 1)
        )
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert not torch.equal(first, other)
    for query in (la.functional_samples, la.predictive_samples):
        generators = (torch.Generator().manual_seed(0) for _ in range(2))
        first, second = (query(BATCH, n_samples=3, generator=g) for g in generators)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert first.shape == (3, 3, 3)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_sampled_weights_agree_with_the_linearised_model_for_a_tight_posterior(cls, kwargs):
    la = posterior(cls, name="bert", prior_precision=1e3, **kwargs)
    nn = la(BATCH, pred_type="nn", link_approx="mc", n_samples=300)
    glm = la(BATCH, link_approx="mc", n_samples=3000)
    torch.testing.assert_close(nn, glm, atol=0.02, rtol=0)
    functions = la.functional_samples(BATCH, pred_type="nn", n_samples=5)
    assert functions.shape == (5, 3, 3)
    assert not torch.equal(functions[0], functions[1])


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_regression_predictions(cls, kwargs):
    la = cls(peft_model("bert"), "regression", **kwargs)
    la.fit(loader(likelihood="regression"))
    mean, covariance = la(BATCH)
    assert_near(covariance, explicit_covariance(la, BATCH))
    joint_mean, joint = la(BATCH, joint=True)
    jacobians, _ = la.backend.jacobians(BATCH)
    assert_near(joint_mean, mean.flatten())
    assert_near(joint, la.functional_covariance(jacobians))
    assert_near(la(BATCH, diagonal_output=True)[1], covariance.diagonal(dim1=1, dim2=2))
    mean, variance = la(BATCH, pred_type="nn", n_samples=4)
    assert mean.shape == variance.shape == (3, 3)


def test_functional_variance_of_given_jacobians_is_the_streamed_one():
    for cls, kwargs in CLASSES:
        la = posterior(cls, **kwargs)
        la.model.eval()
        jacobians, _ = la.backend.jacobians(BATCH)
        assert_near(la.functional_variance(jacobians), la._glm_predictive_distribution(BATCH)[1])


def test_predictions_do_not_depend_on_the_callers_grad_mode():
    la = posterior(**LOW)
    expected = la(BATCH)
    with torch.no_grad():
        assert_near(la(BATCH), expected)
    assert not expected.requires_grad


def test_gradients_flow_through_the_predictive_on_request():
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    X, y = torch.randn(6, 3).double(), torch.arange(6) % 2
    la = KronLoraLaplace(LogitsModel(net), "classification", enable_backprop=True, **DENSE)
    la.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=3))
    x = X[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(la(x).square().sum(), x)
    assert gradient.any()
    with pytest.raises(ValueError, match="cannot be differentiated"):
        la(x, pred_type="nn", link_approx="mc")


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_a_failing_sample_leaves_the_weights_to_the_bit(cls, kwargs):
    la = posterior(cls, dtype=torch.float32, **kwargs)
    weights = parameters_to_vector(la.model.parameters()).clone()
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = la.model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        la(BATCH, pred_type="nn", link_approx="mc", n_samples=5)
    handle.remove()
    assert len(calls) == 3
    torch.testing.assert_close(parameters_to_vector(la.model.parameters()), weights, rtol=0, atol=0)


def test_options_that_mean_nothing_are_refused():
    la = posterior(**LOW)
    with pytest.raises(ValueError, match="'glm' or 'nn'"):
        la(BATCH, pred_type="gp")
    with pytest.raises(ValueError, match="link_approx must be one of"):
        la(BATCH, link_approx="identity")
    with pytest.raises(ValueError, match="choose link_approx='mc'"):
        la(BATCH, pred_type="nn")
    with pytest.raises(ValueError, match="the generator is on meta"):

        class Elsewhere:
            device = torch.device("meta")

        la(BATCH, generator=Elsewhere())
    with pytest.raises(AttributeError, match="not fitted"):
        posterior(fit=False)(BATCH)
