"""Moving a posterior's mean to the mode of the linearised model."""

import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import (
    FullLoraLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    generation,
)
from laplace_lora.capture.jacobians import side_by_side
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.left_out import recentring
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import EVERY_CLASS, posterior
from support.preferences import reward_posterior

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)
NEW = token_batch((4, 2, 6), seed=3)
PRECISION = 0.7


def fitted(cls=KronLoraLaplace, **kwargs):
    la = posterior(cls, fit=False, **kwargs)
    la.fit(loader(lengths=LENGTHS))
    return la


def jacobians(la, batch):
    la.model.eval()
    f, blocks = la.engine.jacobian_blocks(batch)
    return f.detach(), side_by_side(blocks)


def newton_mode(f, J, y, precision):
    """The most probable weights of a linear model, by Newton's method on all of them."""
    w = J.new_zeros(J.shape[-1])
    for _ in range(50):
        p = (f + J @ w).softmax(-1)
        gradient = torch.einsum("ncp,nc->p", J, p - F.one_hot(y, p.shape[1])) + precision * w
        inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        H = torch.einsum("ncp,ncd,ndq->pq", J, inner, J) + precision * torch.eye(len(w)).to(w)
        w = w - torch.linalg.solve(H, gradient)
    return w


@pytest.mark.parametrize("rows", [recentring.ROWS, 0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_training_loss_is_in_nats_whatever_the_temperature(temperature, rows, monkeypatch):
    monkeypatch.setattr(recentring, "ROWS", rows)  # none: by passes over the data
    la = fitted(FullLoraLaplace, temperature=temperature)
    batch = token_batch(LENGTHS)
    f, J = jacobians(la, batch)
    before = float(F.cross_entropy(f, batch["labels"]))
    report = la.recentre(nll=before / 2, train_loader=loader(lengths=LENGTHS))
    after = float(F.cross_entropy(f + J @ la.state.settings.shift, batch["labels"]))
    assert report.nll_before == pytest.approx(before)
    assert after == pytest.approx(before / 2, rel=0.02)
    assert report.nll_after == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
def test_the_shift_is_the_mode_of_the_linear_model_in_weight_space(cls, kwargs):
    la = fitted(cls, **kwargs)
    batch = token_batch(LENGTHS)
    expected = newton_mode(*jacobians(la, batch), batch["labels"], PRECISION)
    report = la.recentre(PRECISION)
    torch.testing.assert_close(la.state.settings.shift, expected, rtol=1e-5, atol=1e-7)
    f, J = jacobians(la, batch)
    after = F.cross_entropy(f + J @ expected, batch["labels"])
    assert report.nll_before == pytest.approx(float(F.cross_entropy(f, batch["labels"])))
    assert report.nll_after == pytest.approx(float(after), rel=1e-6)
    assert report.nll_after < report.nll_before


@pytest.mark.parametrize("cls,kwargs", [*EVERY_CLASS, (FullLoraLaplace, {})])
def test_every_prediction_has_the_new_mean_and_the_old_covariance(cls, kwargs):
    la = fitted(cls, **kwargs)
    mean, covariance = la._glm_predictive_distribution(NEW)
    f, J = jacobians(la, NEW)
    la.recentre(PRECISION)
    moved = f + J @ la.state.settings.shift
    found = la._glm_predictive_distribution(NEW)
    torch.testing.assert_close(found[0], moved)
    torch.testing.assert_close(found[1], covariance)
    joint = la._glm_predictive_distribution(NEW, joint=True)
    torch.testing.assert_close(joint[0], moved.flatten())
    torch.testing.assert_close(la.predict(NEW).mean, moved)
    la.prior_precision = 1e9
    torch.testing.assert_close(la(NEW), moved.softmax(-1), rtol=1e-4, atol=1e-5)
    la.reset_mean()
    torch.testing.assert_close(la._glm_predictive_distribution(NEW)[0], mean)


def test_gradients_flow_through_the_new_mean():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    X, y = torch.randn(6, 3).double(), torch.arange(6) % 2
    la = KronLoraLaplace(LogitsModel(net.double()), "classification", enable_backprop=True)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=3))
    la.recentre(PRECISION)
    x = X[:2].clone().requires_grad_()
    f, J = jacobians(la, x)
    mean, _ = la._glm_predictive_distribution(x)
    torch.testing.assert_close(mean, f + J @ la.state.settings.shift)
    (gradient,) = torch.autograd.grad(mean.sum(), x)
    assert gradient.any()


def test_samples_lie_around_the_new_mean():
    la = fitted(name="bert", prior_precision=1e6)
    la.recentre(PRECISION)
    la.covariance_scale = 4.0
    centre = la.mean + la.state.settings.shift
    torch.testing.assert_close(la.sample(2000).mean(0), centre, rtol=0, atol=2e-4)
    deviations = la.fitted.deviations(2000, None)
    assert float(deviations.mean(0).abs().max()) < 4e-4
    parts = torch.cat([mean.flatten() for mean, _ in la.marginals().values()])
    torch.testing.assert_close(parts, centre)
    weights = [p.detach().clone() for p in la.params]
    outputs = la.functional_samples(NEW, pred_type="nn", n_samples=20).mean(0)
    for parameter, part in zip(
        la.params, centre.split([p.numel() for p in la.params]), strict=True
    ):
        parameter.data.copy_(part.view_as(parameter))
    with torch.no_grad():
        torch.testing.assert_close(outputs, la.model.eval()(NEW), rtol=0, atol=1e-2)
    for parameter, weight in zip(la.params, weights, strict=True):
        parameter.data.copy_(weight)


def test_evidence_and_model_stay():
    la = fitted()
    before = float(la.log_marginal_likelihood()), [p.clone() for p in la.params]
    la.recentre(PRECISION)
    assert float(la.log_marginal_likelihood()) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(la.params, before[1], strict=True))


def test_by_the_training_loss():
    la = fitted()
    start = la.state.loss / len(LENGTHS)
    assert la.recentre(nll=0.5 * start).nll_after == pytest.approx(0.5 * start, rel=0.05)


def test_pairs_and_regressions():
    la = reward_posterior()
    report = la.recentre(PRECISION)
    assert report.nll_after < report.nll_before
    la = KronLoraLaplace(peft_model("bert", dtype=torch.float64), "regression", sigma_noise=0.5)
    data = loader(lengths=LENGTHS, likelihood="regression")
    la.fit(data)
    batch = next(iter(DataLoader(data.dataset, batch_size=len(LENGTHS))))
    f, J = jacobians(la, batch)
    la.recentre(PRECISION)
    flat = J.flatten(0, 1)
    P = flat.T @ flat / 0.25 + PRECISION * torch.eye(flat.shape[1]).to(flat)
    expected = torch.linalg.solve(P, flat.T @ (batch["labels"] - f).flatten() / 0.25)
    torch.testing.assert_close(la.state.settings.shift, expected, rtol=1e-6, atol=1e-8)


def test_files_and_dictionaries_keep_it(tmp_path):
    la = fitted()
    la.recentre(PRECISION)
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    assert torch.equal(again.state.settings.shift, la.state.settings.shift)
    assert torch.equal(again(NEW), la(NEW))
    other = fitted()
    other.load_state_dict(la.state_dict())
    assert torch.equal(other(NEW), la(NEW))
    la.reset_mean()
    la.save_pretrained(tmp_path, precision="exact")
    plain = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    assert plain.state.settings.shift is None


@pytest.mark.parametrize("undo", ["fit", "tune"])
def test_a_fit_and_a_tuning_undo_it(undo):
    la = fitted()
    la.recentre(PRECISION)
    if undo == "fit":
        la.fit(loader(lengths=LENGTHS))
    else:
        la.optimize_prior_precision(method="marglik")
    assert la.state.settings.shift is None


def test_refusals(tmp_path):
    la = fitted()
    for arguments in ({}, {"precision": 1.0, "nll": 0.3}):
        with pytest.raises(ValueError, match="either `precision` or `nll`"):
            la.recentre(**arguments)
    with pytest.raises(ValueError, match="precision must be positive"):
        la.recentre(-1.0)
    with pytest.raises(ValueError, match="7 examples, the fit saw 12"):
        la.recentre(1.0, train_loader=loader())
    la.save_pretrained(tmp_path, precision="exact")
    la = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    with pytest.raises(ValueError, match="needs the training data"):
        la.recentre(1.0)


def test_language_models_and_texts_are_refused():
    la = posterior(name="llama-lm")
    la.recentre(PRECISION)
    with pytest.raises(ValueError, match="reset_mean"):
        generation.score(la, NEW, method="exact")
    lm = KronLoraLaplace(peft_model("llama-lm"), "language_modeling")
    batch = token_batch((4, 3, 5))
    lm.fit(
        DataLoader(
            [
                {k: v[n] for k, v in batch.items() if k != "labels"}
                | {"labels": batch["input_ids"][n]}
                for n in range(3)
            ],
            batch_size=3,
        )
    )
    with pytest.raises(ValueError, match="language"):
        lm.recentre(PRECISION)
    assert not hasattr(FunctionalLoraLLLaplace, "recentre")
    assert hasattr(KronLoraLLLaplace, "recentre")


@pytest.mark.parametrize("joint", [False, True])
def test_a_recentred_prediction_holds_few_jacobians_at_once(joint, monkeypatch):
    la = fitted(KronLoraLaplace)
    f, J = jacobians(la, NEW)
    la.recentre(PRECISION)
    expected = f + J @ la.state.settings.shift
    blocks_of, references, most = type(la.engine).jacobian_blocks, [], []

    def watched(*args, **kwargs):
        outputs, blocks = blocks_of(*args, **kwargs)

        def each():
            for block in blocks:
                references.append(weakref.ref(block))
                most.append(sum(reference() is not None for reference in references))
                yield block

        return outputs, each()

    monkeypatch.setattr(type(la.engine), "jacobian_blocks", watched)
    mean, _ = Predictor(la.fitted).distribution(NEW, joint)
    torch.testing.assert_close(mean.view_as(expected), expected)
    assert len(most) == len(la.fitted.names) > 4 >= max(most)
