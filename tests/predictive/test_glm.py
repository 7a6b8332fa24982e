"""The GLM predictive: exact covariances and every link."""

import pytest
import torch
from laplace import DiagLaplace, KronLaplace
from laplace.curvature import CurvatureInterface

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from support.batches import loader, token_batch
from support.models import ARCHITECTURES, peft_model
from support.posteriors import CLASSES, DENSE, LOW, posterior
from support.references import assert_near

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
    with pytest.raises(ValueError, match="n_samples of 2 or more"):
        la(BATCH, pred_type="nn", n_samples=1)


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


def test_predictions_of_fused_attention_are_differentiable():
    """It has no derivative of its derivative."""
    gradients = []
    for attention in ("sdpa", "eager"):
        model = peft_model("bert")
        model.get_base_model().set_attn_implementation(attention)
        la = KronLoraLaplace(model, "classification", enable_backprop=True, **DENSE)
        la.fit(loader())
        batch = token_batch((4, 2))
        embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach()
        embeddings.requires_grad_()
        p = la({**batch, "inputs_embeds": embeddings})
        gradients += torch.autograd.grad(p[:, 0].sum(), embeddings)
    assert gradients[0].any()
    assert_near(*gradients, 1e-5)


def test_options_that_mean_nothing_are_refused():
    la = posterior(**LOW)
    with pytest.raises(ValueError, match="'glm' or 'nn'"):
        la(BATCH, pred_type="gp")
    with pytest.raises(ValueError, match="link_approx must be one of"):
        la(BATCH, link_approx="identity")
    with pytest.raises(ValueError, match="choose link_approx='mc'"):
        la(BATCH, pred_type="nn")
    with pytest.raises(ValueError, match="the generator is on meta"):

        class Elsewhere(torch.Generator):
            device = torch.device("meta")

        la(BATCH, generator=Elsewhere())


def test_a_seed_is_no_generator():
    la = posterior(**LOW)
    for call in (
        lambda: la(BATCH, generator=3),
        lambda: la(BATCH, pred_type="nn", link_approx="mc", generator=3),
        lambda: la.predict(BATCH, generator=3),
        lambda: la.functional_samples(BATCH, generator=3),
        lambda: la.functional_samples(BATCH, "nn", generator=3),
        lambda: la.sample(2, generator=3),
    ):
        with pytest.raises(TypeError, match=r"a seed goes into one, torch.Generator\("):
            call()
    with pytest.raises(AttributeError, match="not fitted"):
        posterior(fit=False)(BATCH)
    with pytest.raises(AttributeError, match="not fitted"):
        _ = posterior(fit=False).scatter
