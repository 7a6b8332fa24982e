"""The linearised model's mode where there are too many examples to keep their Jacobians."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.predictive import tangents
from laplace_lora.tuning.left_out import examples, leave_one_out, recentring, recentring_by_passes
from laplace_lora.tuning.left_out.linear_model import LinearModel
from laplace_lora.tuning.left_out.spanned_model import SpannedModel
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import DENSE, EVERY_CLASS, LOW, posterior
from support.preferences import reward_posterior
from support.references import assert_near
from support.sweeps import rest_slow

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)
NEW = token_batch((4, 2, 6), seed=3)


@pytest.fixture
def keeps_none(monkeypatch):
    monkeypatch.setattr(recentring, "ROWS", 0)


class Counted(list):
    """Rows that count how often each is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)

    @property
    def passes(self):
        return self.reads / len(self)


def fitted(cls=KronLoraLaplace, **kwargs):
    la = posterior(cls, fit=False, **kwargs)
    la.fit(loader(lengths=LENGTHS))
    return la


def counted(batch_size=4, shuffle=False):
    rows = Counted(loader(lengths=LENGTHS).dataset)
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle)


@pytest.mark.parametrize("precision", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("cls,kwargs", [*EVERY_CLASS, (FullLoraLaplace, {})])
def test_five_passes_come_close_to_the_mode(cls, kwargs, precision, monkeypatch):
    la = fitted(cls, **kwargs)
    report = la.recentre(precision)
    exact, before = la.state.settings.shift, la(NEW)
    objective = len(LENGTHS) * report.nll_after + 0.5 * precision * float(exact @ exact)
    start = len(LENGTHS) * report.nll_before
    monkeypatch.setattr(recentring, "ROWS", 0)
    data = counted()
    near = la.recentre(precision, train_loader=data)
    shift = la.state.settings.shift
    found = len(LENGTHS) * near.nll_after + 0.5 * precision * float(shift @ shift)
    assert data.dataset.passes <= 5
    assert near.nll_before == pytest.approx(report.nll_before, rel=1e-6)
    assert objective <= found * (1 + 1e-6)
    assert found - objective <= 0.02 * (start - objective)
    if precision >= 1:
        assert (la(NEW) - before).abs().max() < 0.05


def test_the_loss_at_the_shift_is_the_linear_models(keeps_none):
    la = fitted(**LOW)
    report = la.recentre(0.5)
    batch = token_batch(LENGTHS)
    mean, _ = la._glm_predictive_distribution(batch)
    assert float(F.cross_entropy(mean, batch["labels"])) == pytest.approx(report.nll_after)


def test_by_the_training_loss(keeps_none):
    la = fitted(**DENSE)
    start = la.state.loss / len(LENGTHS)
    assert la.recentre(nll=0.5 * start).nll_after == pytest.approx(0.5 * start, rel=0.05)


def test_neither_order_nor_batches_matter(keeps_none):
    la = fitted(**LOW)
    shifts = []
    for data in (counted(), counted(5, shuffle=True)):
        la.recentre(1.0, train_loader=data)
        shifts.append(la.state.settings.shift)
    torch.testing.assert_close(shifts[1], shifts[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kwargs", [LOW, {"backend_kwargs": {"stochastic": True}}])
def test_tangents_give_what_jacobians_give(keeps_none, monkeypatch, kwargs):
    la = fitted(**kwargs)
    before = la.recentre(1.0).nll_before  # three classes are fewer than the directions
    shift = la.state.settings.shift
    calls = []

    def counted_tangents(*args):
        calls.append(args)
        return tangents.tangents_along(*args)

    monkeypatch.setattr(tangents, "CROSSOVER", 0)
    monkeypatch.setattr(recentring_by_passes, "tangents_along", counted_tangents)
    assert la.recentre(1.0).nll_before == pytest.approx(before)
    assert calls
    assert_near(la.state.settings.shift, shift, 1e-5)


@pytest.mark.parametrize(
    "error", rest_slow([NoForwardDerivativeError, tangents.OtherOutputsError], 0)
)
def test_models_without_tangents_have_jacobians(keeps_none, monkeypatch, error):
    la = fitted(**LOW)
    la.recentre(1.0)
    shift = la.state.settings.shift

    def refuse(*args):
        raise error("no tangents")

    monkeypatch.setattr(tangents, "CROSSOVER", 0)
    monkeypatch.setattr(recentring_by_passes, "tangents_along", refuse)
    la.recentre(1.0)
    torch.testing.assert_close(la.state.settings.shift, shift)


def test_without_the_fits_gradient_it_takes_a_pass_for_it(keeps_none):
    la = fitted(backend_kwargs={"stochastic": True, "num_samples": 2}, **LOW)
    assert la.state.loss_gradient is None
    data = counted()
    report = la.recentre(1.0, train_loader=data)
    assert data.dataset.passes <= 4 and report.nll_after < report.nll_before


def test_pairs_and_regressions(keeps_none):
    la = reward_posterior()
    report = la.recentre(1.0)
    assert report.nll_after < report.nll_before
    la = DiagLoraLaplace(peft_model("bert", dtype=torch.float64), "regression", sigma_noise=0.5)
    la.fit(loader(lengths=LENGTHS, likelihood="regression"))
    report = la.recentre(1.0)
    assert report.nll_after < report.nll_before


def test_data_of_another_fit_are_refused(keeps_none):
    la = fitted(**LOW)
    with pytest.raises(ValueError, match="7 examples, the fit saw 12"):
        la.recentre(1.0, train_loader=loader())
    assert la.state.settings.shift is None


@pytest.mark.slow
def test_leave_one_out_of_some_examples_moves_the_mean_by_all(monkeypatch, keeps_none):
    monkeypatch.setattr(examples, "ROWS", 2 * len(LENGTHS) - 1)
    monkeypatch.setattr(examples, "EXAMPLES", 9)
    monkeypatch.setattr(examples, "FEWEST", 3)
    closer = {}

    def always(linear, mode, *others):
        closer["nll"] = 0.5 * mode.nll / 9
        return linear.fitted_like(0.5 * mode.nll)

    monkeypatch.setattr(leave_one_out, "closer_fit", always)
    la = fitted(**LOW)
    la.optimize_prior_precision(method="loo")
    report = la.tuning.leave_one_out
    assert report.examples == 9
    assert report.recentring.nll_after == pytest.approx(closer["nll"], rel=0.05)


def test_the_mode_in_a_span_is_where_the_gradient_vanishes():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 2, 5, generator=generator, dtype=torch.float64)
    offset = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    la = posterior()
    functions = LinearModel(offset.new_empty(0), offset, y, la.fitted.objective, True)
    model = SpannedModel(functions, rows)
    mode = model.mode(0.3, model.mode(5.0))
    x = mode.coefficients.clone().requires_grad_()
    loss = F.cross_entropy(F.pad(offset + rows @ x, (1, 0)), y, reduction="sum")
    assert float(loss.detach()) == pytest.approx(mode.nll)
    (loss + 0.15 * x.square().sum()).backward()
    assert x.grad.abs().max() < 1e-5
    target = 0.5 * (mode.nll + functions.nll(offset))
    assert model.fitted_like(target).nll == pytest.approx(target, rel=0.05)
