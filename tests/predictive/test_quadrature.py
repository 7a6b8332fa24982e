"""The default link through a posterior: only contrasts count, only contrasts are computed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
)
from laplace_lora.curvature.engine import Engine
from support.batches import loader, token_batch
from support.models import TARGETS, peft_model
from support.posteriors import CLASSES, DENSE, posterior
from support.references import assert_near
from support.sweeps import rest_slow

BATCH = token_batch((4, 2, 6), seed=9)


class Shifted(nn.Module):
    """Two layers, and a trained shift of all logits that depends on the input."""

    def __init__(self, classes, shift=False):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, classes)
        self.shift = nn.Linear(4, 1) if shift else None
        if shift:
            nn.init.normal_(self.shift.weight, std=3.0)

    def forward(self, x):
        logits = self.head(self.hidden(x).tanh())
        return logits if self.shift is None else logits + self.shift(x)


def inputs(n=8):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1)).double()


def fitted_net(cls, kwargs, classes, shift=False):
    la = cls(LogitsModel(Shifted(classes, shift).double()), "classification", **kwargs)
    la.fit(DataLoader(TensorDataset(inputs(), torch.arange(8) % classes), batch_size=4))
    return la


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "cls,kwargs",
    rest_slow([(KronLoraLaplace, DENSE), (DiagLoraLaplace, {}), (FullLoraLaplace, {})], 0),
)
def test_a_trained_shift_of_all_logits_changes_nothing(cls, kwargs, classes):
    """No label tells where all logits should be, so the shift keeps the width of its prior."""
    plain = fitted_net(cls, kwargs, classes)
    shifted = fitted_net(cls, kwargs, classes, shift=True)
    x = 3 * inputs(5)
    assert_near(shifted(x), plain(x), 1e-9)
    variances = [
        la._glm_predictive_distribution(x)[1].diagonal(dim1=1, dim2=2) for la in (shifted, plain)
    ]
    assert (variances[0] > 1.5 * variances[1]).any()
    probit = [la(x, link_approx="probit") for la in (shifted, plain)]
    assert (probit[0] - probit[1]).abs().max() > 1e-2
    for la in (shifted, plain):
        la.calibrate([(inputs(), torch.arange(8) % classes)])
    assert_near(shifted(x), plain(x), 1e-2)


def columns_of(call):
    """Number of columns that a call sends backward through the engine."""
    found, original = [], Engine.jacobian_blocks

    def counting(self, x, columns=None, function=None):
        f, jacobians = original(self, x, columns, function)
        found.append(f.shape[1] if columns is None else len(columns(f)))
        return f, jacobians

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "jacobian_blocks", counting)
        call()
    return found


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace, KronLoraLLLaplace])
@pytest.mark.parametrize("classes", [2, 3])
def test_one_backward_pass_less_than_classes(cls, classes):
    la = cls(peft_model("bert", num_labels=classes), "classification")
    la.fit(loader(labels=classes))
    for options, columns in (
        ({}, classes - 1),
        ({"link_approx": "mc"}, classes - 1),
        ({"link_approx": "probit"}, classes),
        ({"diagonal_output": True}, classes),
    ):
        assert columns_of(lambda options=options: la(BATCH, **options)) == [columns]
    data = loader(7, labels=classes)
    for tune in (
        lambda: la.calibrate(data),
        lambda: la.optimize_prior_precision(method="val_gd", val_loader=data, n_steps=2),
        lambda: la.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=3),
    ):
        assert columns_of(tune) == [classes - 1]


def test_backward_passes_themselves():
    la = posterior(name="bert", **DENSE)
    passes, original = [], torch.autograd.grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or original(*a, **k))
        la(BATCH)
        assert len(passes) == 2
        la(BATCH, link_approx="probit")
        assert len(passes) == 5


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_the_integral_of_samples_from_the_moments(cls, kwargs):
    la = posterior(cls, prior_precision=0.05, **kwargs)
    mean, covariance = la._glm_predictive_distribution(BATCH)
    state = torch.random.get_rng_state()
    found = la(BATCH)
    assert torch.equal(la(BATCH), found)
    assert torch.equal(torch.random.get_rng_state(), state)
    root = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(3))
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400_000, 3, generator=generator).double() @ root.mT
    expected = torch.stack([(m + d).softmax(-1).mean(0) for m, d in zip(mean, draws, strict=True)])
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=0)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2).sqrt())
    draws = torch.randn(400_000, 3, generator=generator).double() @ diagonal
    expected = torch.stack([(m + d).softmax(-1).mean(0) for m, d in zip(mean, draws, strict=True)])
    found = la(BATCH, diagonal_output=True)
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=0)


def test_batches_do_not_matter():
    la = KronLoraLaplace(peft_model("llama-lm"), "classification", target_ids=TARGETS)
    la.fit(loader())
    whole = la(BATCH)
    for n in range(3):
        alone = {key: value[n : n + 1] for key, value in BATCH.items()}
        assert_near(la(alone), whole[n : n + 1])


def test_gradients_through_the_integral_are_those_of_finite_differences():
    la = FullLoraLaplace(
        LogitsModel(Shifted(2, shift=True).double()), "classification", enable_backprop=True
    )
    la.fit(DataLoader(TensorDataset(inputs(), torch.arange(8) % 2), batch_size=4))
    x = inputs(2).requires_grad_()
    (gradient,) = torch.autograd.grad(la(x)[:, 1].sum(), x)
    for i in range(4):
        step = torch.zeros_like(x)
        step[:, i] = 1e-4
        with torch.no_grad():
            rise = la((x + step).detach())[:, 1] - la((x - step).detach())[:, 1]
        assert_near(gradient[:, i], rise / 2e-4, 1e-4)
