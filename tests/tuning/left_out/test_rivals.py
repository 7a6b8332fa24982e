"""Leave-one-out where all classes would be too many to be told apart from."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from laplace_lora import FullLoraLaplace, FullLoraLLLaplace, KronLoraLaplace
from laplace_lora.data.distributed import ALONE
from laplace_lora.likelihoods.base import CONTRASTS, OUTPUTS
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.left_out import examples, leave_one_out
from laplace_lora.tuning.left_out.cavity_widths import Covariances
from laplace_lora.tuning.left_out.examples import look_at
from laplace_lora.tuning.left_out.linear_model import LinearModel, without_own
from laplace_lora.tuning.left_out.rivals import Rivals, loss_among
from laplace_lora.tuning.validation.cache import scoring_of
from support.batches import loader, rows, split_rows, token_batch
from support.posteriors import posterior

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)


@pytest.fixture
def one_rival(monkeypatch):
    """Twelve examples of three classes are more than is affordable, of two they are not."""
    monkeypatch.setattr(examples, "ROWS", 2 * len(LENGTHS) - 1)
    monkeypatch.setattr(examples, "RIVALS", 1)


def fitted(cls=KronLoraLaplace, data=None):
    la = posterior(cls, "bert", fit=False)
    la.fit(loader(lengths=LENGTHS) if data is None else data)
    return la


def reference(la):
    """Each example's contrast to its rival: left out of the base model, and the posterior's."""
    trained = copy.deepcopy(la.logits_model).eval()
    base = copy.deepcopy(trained)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    weights = [p for p in base.parameters() if p.requires_grad]
    fitted_contrasts, means, jacobians, contrasts, shares = [], [], [], [], []
    rivals = Rivals(3, 1)
    for x in split_rows(token_batch(LENGTHS)):
        one = rows({k: v.unsqueeze(0) for k, v in x.items()}, slice(None))
        rivals.draw(one["labels"])
        contrasts.append(rivals.readout.columns(torch.zeros(1, 3).double())[0, 0])
        outputs = trained(one)[0].detach()
        fitted_contrasts.append(outputs @ contrasts[-1])
        shares.append(outputs.softmax(-1)[contrasts[-1] != 0].sum())
        value = base(one)[0] @ contrasts[-1]
        gradient = torch.autograd.grad(value, weights)
        jacobians.append(torch.cat([g.flatten() for g in gradient]))
        means.append(value.detach())
    J, labels = torch.stack(jacobians), torch.zeros(len(means), dtype=torch.long)
    options = (labels, likelihood_of("classification"), True)
    linear = LinearModel(J @ J.T, torch.stack(means).unsqueeze(1), *options)
    mode = linear.fitted_like(linear.nll(torch.stack(fitted_contrasts).unsqueeze(1)))
    own = linear.root(torch.stack(fitted_contrasts).unsqueeze(1))
    own = own * torch.stack(shares).sqrt()[:, None, None]
    return linear.leave_one_out(mode)[0], torch.stack(contrasts), own


def score(la, precision, means, contrasts, own):
    la.prior_precision = precision
    _, covariance = Predictor(la.fitted).readout_moments(token_batch(LENGTHS), OUTPUTS)
    variance = torch.einsum("nc,ncd,nd->n", contrasts, covariance, contrasts)[:, None, None]
    if la.fitted.leaves_examples_out:
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
    assert "12 examples, told apart from 1 random classes each" in str(la.tuning)
    best = score(la, chosen, *parts)
    assert report.nll == pytest.approx(best, rel=1e-3)
    for factor in (0.03, 0.5, 0.9, 1.1, 2, 30):
        other = min(max(chosen * factor, 1e-4), 1e8)
        assert best <= score(la, other, *parts) + 2e-4


@pytest.mark.parametrize("cls", [FullLoraLaplace, FullLoraLLLaplace])
def test_no_more_is_taken_out_than_an_example_has_taught(cls, one_rival):
    la = fitted(cls)
    found = Covariances(look_at(la.fitted, la._train_loader, ALONE, None), ALONE)
    x = token_batch(LENGTHS)
    rivals = Rivals(3, 1)
    rivals.draw(x["labels"])
    columns = rivals.readout.columns(torch.zeros(len(LENGTHS), 3).double())
    onto = columns.transpose(0, 1)[:, :, 1:]  # from contrasts to the first class
    for delta in (1e-3, 0.1, 10.0):
        la.prior_precision = delta
        f, marginal = Predictor(la.fitted).readout_moments(x, CONTRASTS)
        root = la.objective.root(F.pad(f, (1, 0)), x["labels"]).transpose(0, 1)[:, :, 1:]
        deleted = onto @ without_own(marginal, root) @ onto.mT
        assert (found(delta) > onto @ marginal @ onto.mT).all()
        assert (found(delta) < deleted * (1 + 1e-4)).all()


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


def test_the_size_of_batches_changes_nothing(one_rival):
    chosen = []
    for size in (5, 12):
        la = fitted(data=loader(batch_size=size, lengths=LENGTHS))
        la.optimize_prior_precision()
        chosen.append(float(la.prior_precision))
    assert chosen[0] == pytest.approx(chosen[1], rel=2e-3)


def test_with_all_rivals_nothing_is_left_out():
    """Contrasts to the label and to a fixed class fix the same softmax."""
    f = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 3, 1, 2, 3])
    rivals = Rivals(4, 3)
    rivals.draw(y)
    nll = F.cross_entropy(F.pad(rivals.readout.mean(f), (1, 0)), torch.zeros_like(y))
    assert nll == pytest.approx(F.cross_entropy(f, y))
    columns = rivals.readout.columns(f)
    assert torch.allclose(torch.einsum("kbc,bc->bk", columns, f), rivals.readout.mean(f))


def test_which_classes_are_compared_says_nothing_about_the_label():
    """Each set of classes is as likely with each of its members as the label."""
    rivals, met = Rivals(5, 2), torch.zeros(5, 5, dtype=torch.long)
    for label in torch.arange(5).repeat(400).split(100):
        rivals.draw(label)
        own, others = label.repeat_interleave(2), rivals._chosen[:, 1:].flatten()
        met.index_put_((own, others), torch.ones_like(own), accumulate=True)
    assert torch.equal(met.diagonal(), torch.zeros(5, dtype=torch.long))
    expected = 400 * 2 / 4
    apart = met[~torch.eye(5, dtype=torch.bool)].double() - expected
    assert apart.abs().max() < 4 * (expected / 2) ** 0.5


@pytest.mark.slow
def test_labels_that_say_nothing_about_texts_are_not_learnt():
    """Rivals that are the likeliest for the network gave labels away as the unexpected ones."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(40, (120,), generator=generator)
    features = torch.randn(120, 3, generator=generator).double()
    rivals = Rivals(40, 10)
    rivals.draw(y)
    # A linear head on the features, and a bias for each class, trained from zero.
    inputs = torch.cat([features, torch.ones(120, 1)], dim=1)
    columns = rivals.readout.columns(torch.zeros(120, 40).double())
    J = torch.einsum("knc,nd->nkcd", columns, inputs).flatten(2).flatten(0, 1)
    labels, offset = torch.zeros(120, dtype=torch.long), torch.zeros(120, 10).double()
    linear = LinearModel(J @ J.T, offset, labels, likelihood_of("classification"), True)
    for nll in (2.3, 2.0, 1.5):
        mode = linear.fitted_like(120 * nll)
        left_out = linear.leave_one_out(mode)[0]
        assert (
            linear.nll(left_out) / 120 > math.log(11) - 0.03
        )  # below by 0.06 to 0.6 with the likeliest


def test_a_mode_is_fitted_to_what_is_lost_among_rivals():
    """A loss among some classes is smaller than that among all, which the mean is moved by."""
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(30 * 4, 90, generator=generator).double()
    offset = torch.randn(30, 4, generator=generator).double()
    y = torch.randint(5, (30,), generator=generator)
    linear = LinearModel(J @ J.T, offset, y, likelihood_of("classification"), True, 0.7)
    rivals = Rivals(5, 2)
    rivals.draw(y)

    def among(outputs):
        logits = F.pad(outputs, (1, 0)).gather(1, rivals._chosen)
        return 0.7 * float(F.cross_entropy(logits, torch.zeros_like(y), reduction="sum"))

    target = 0.6 * among(offset)
    mode = linear.fitted_like(target, loss_among(linear, 2))
    assert among(mode.outputs) == pytest.approx(target, rel=0.02)
    assert mode.nll > 1.1 * target
    assert linear.fitted_like(target).precision < 0.9 * mode.precision
    assert loss_among(linear, 0)(offset) == pytest.approx(linear.nll(offset))
    assert loss_among(linear, 4)(offset) == pytest.approx(linear.nll(offset))
