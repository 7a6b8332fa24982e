"""Leave-one-out among an example's likeliest classes, where all would be too many."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from laplace_lora import FullLoraLaplace, KronLoraLaplace
from laplace_lora.likelihoods.base import OUTPUTS
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning import leave_one_out, looked_at
from laplace_lora.tuning.likely_classes import LikelyClasses
from laplace_lora.tuning.linear_model import LinearModel, without_own
from laplace_lora.tuning.validation_cache import scoring_of
from support.batches import loader, rows, split_rows, token_batch
from support.posteriors import posterior

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)


@pytest.fixture
def one_rival(monkeypatch):
    """Twelve examples of three classes are more than is affordable, of two they are not."""
    monkeypatch.setattr(looked_at, "ROWS", 2 * len(LENGTHS) - 1)
    monkeypatch.setattr(looked_at, "RIVALS", 1)


def fitted(cls=KronLoraLaplace, data=None):
    la = posterior(cls, "bert", fit=False)
    la.fit(loader(lengths=LENGTHS) if data is None else data)
    return la


def rival_of(model, x):
    with torch.no_grad():
        f = model(x)[0]
    f[x["labels"]] = -torch.inf
    return int(f.argmax())


def reference(la):
    """Each example's contrast to its rival: left out of the base model, and the posterior's."""
    trained = copy.deepcopy(la.logits_model).eval()
    base = copy.deepcopy(trained)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    weights = [p for p in base.parameters() if p.requires_grad]
    fitted_contrasts, means, jacobians, contrasts = [], [], [], []
    for x in split_rows(token_batch(LENGTHS)):
        one = rows({k: v.unsqueeze(0) for k, v in x.items()}, slice(None))
        label, rival = int(x["labels"]), rival_of(trained, one)
        contrast = F.one_hot(torch.tensor(rival), 3) - F.one_hot(torch.tensor(label), 3)
        contrasts.append(contrast.double())
        fitted_contrasts.append(trained(one)[0].detach() @ contrasts[-1])
        value = base(one)[0] @ contrasts[-1]
        gradient = torch.autograd.grad(value, weights)
        jacobians.append(torch.cat([g.flatten() for g in gradient]))
        means.append(value.detach())
    J, labels = torch.stack(jacobians), torch.zeros(len(means), dtype=torch.long)
    options = (labels, likelihood_of("classification"), True)
    linear = LinearModel(J @ J.T, torch.stack(means).unsqueeze(1), *options)
    mode = linear.fitted_like(linear.nll(torch.stack(fitted_contrasts).unsqueeze(1)))
    own = linear.root(torch.stack(fitted_contrasts).unsqueeze(1))
    return linear.leave_one_out(mode)[0], torch.stack(contrasts), own


def score(la, precision, means, contrasts, own):
    la.prior_precision = precision
    _, covariance = Predictor(la.fitted).readout_moments(token_batch(LENGTHS), OUTPUTS)
    variance = torch.einsum("nc,ncd,nd->n", contrasts, covariance, contrasts)[:, None, None]
    if la.structure.couples_groups:
        variance = without_own(variance, own)
    labels = torch.zeros(len(means), dtype=torch.long)
    return float(scoring_of(la.fitted, "quadrature", 0).nll(means, variance, labels).mean())


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace])
def test_the_choice_is_the_best_by_brute_force(cls, one_rival):
    la = fitted(cls)
    parts = reference(la)
    la.optimize_prior_precision()
    report, chosen = la.tuning.leave_one_out, float(la.prior_precision)
    assert la.tuning.method == "loo" and report.examples == len(LENGTHS)
    assert "12 examples among their 2 likeliest classes" in str(la.tuning)
    best = score(la, chosen, *parts)
    assert report.nll == pytest.approx(best, rel=1e-3)
    for factor in (0.03, 0.5, 0.9, 1.1, 2, 30):
        other = min(max(chosen * factor, 1e-4), 1e8)
        assert best <= score(la, other, *parts) + 2e-4


def test_it_is_not_what_all_classes_choose(one_rival, monkeypatch):
    few, all_of_them = fitted(), fitted()
    few.optimize_prior_precision()
    monkeypatch.undo()
    all_of_them.optimize_prior_precision()
    assert few.tuning.leave_one_out.nll != pytest.approx(all_of_them.tuning.leave_one_out.nll)


def test_the_mean_moves_for_all_classes_and_examples(one_rival, monkeypatch):
    def closer(linear, mode, *others):
        return linear.fitted_like(0.5 * mode.nll)

    monkeypatch.setattr(leave_one_out, "closer_fit", closer)
    la = fitted()
    la.optimize_prior_precision()
    report, shift = la.tuning.leave_one_out.recentring, la.state.settings.shift
    assert report.nll_after < report.nll_before
    la.recentre(report.precision)
    torch.testing.assert_close(la.state.settings.shift, shift, rtol=1e-4, atol=1e-7)


def test_the_order_of_the_data_changes_nothing(one_rival):
    chosen = []
    for data in (
        loader(batch_size=5, lengths=LENGTHS),
        DataLoader(loader(lengths=LENGTHS).dataset, batch_size=4, shuffle=True),
    ):
        la = fitted(data=data)
        la.optimize_prior_precision()
        chosen.append(float(la.prior_precision))
    assert chosen[0] == pytest.approx(chosen[1], rel=2e-3)


def test_with_all_rivals_nothing_is_left_out():
    """Contrasts to the label and to a fixed class fix the same softmax."""
    f = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 3, 1, 2, 3])
    likely = LikelyClasses(3)
    likely.choose(f, y)
    nll = F.cross_entropy(F.pad(likely.readout.mean(f), (1, 0)), torch.zeros_like(y))
    assert nll == pytest.approx(F.cross_entropy(f, y))
    columns = likely.readout.columns(f)
    assert torch.allclose(torch.einsum("kbc,bc->bk", columns, f), likely.readout.mean(f))


def test_rivals_are_the_likeliest_other_classes():
    likely = LikelyClasses(2)
    f = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 9.0, 1.0, 2.0]])
    likely.choose(f, torch.tensor([1, 1]))
    assert likely.readout.mean(f).tolist() == [[3.0, 2.0], [-7.0, -8.0]]
