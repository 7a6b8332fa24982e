"""Widths without a group of examples are those of a fit without the group."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import FullLoraLaplace, FullLoraLLLaplace
from laplace_lora.data.distributed import ALONE
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.left_out import cavity_widths, examples
from laplace_lora.tuning.left_out.cavity_widths import CavityWidths
from laplace_lora.tuning.left_out.shared_inputs import SharedInputs
from support.batches import split_rows, token_batch
from support.posteriors import posterior
from support.preferences import related_pairs, reward_posterior

DELTA = 0.3


def copied_texts():
    """Five texts, the first three times with other labels, the second twice."""
    rows = split_rows(token_batch((3, 6, 4, 5, 2)))
    again = [{**rows[i], "labels": torch.tensor(y)} for i, y in ((0, 2), (1, 1), (0, 1))]
    return [*rows, *again]


CHAIN = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))


def rewards():
    """Of an encoder: a Llama rounds its norms to single precision."""
    return reward_posterior(FullLoraLaplace, "bert", fit=False)


def head_rewards():
    return reward_posterior(FullLoraLLLaplace, "bert", fit=False)


CASES = [
    pytest.param(partial(posterior, FullLoraLaplace, "bert", fit=False), copied_texts, id="copies"),
    pytest.param(rewards, related_pairs, id="pairs"),
    pytest.param(partial(posterior, FullLoraLLLaplace, "bert", fit=False), copied_texts, id="head"),
    pytest.param(head_rewards, related_pairs, id="pairs-head"),
]


def fitted(make, rows, delta=DELTA):
    la = make()
    la.fit(DataLoader(rows, batch_size=1))
    la.prior_precision = delta
    return la


def cavities(la, rows):
    """Covariances with and without what is left out, and what that is."""
    predictor = Predictor(la.fitted)
    inputs = SharedInputs("labels", keep_pairs=True)
    means, covariances, labels = [], [], []
    for batch in DataLoader(rows, batch_size=1):
        x, y = la.fitted.split(la.fitted.by_example(batch))
        inputs.add(x, y)
        mean, covariance = predictor.readout_moments(x, CONTRASTS)
        means.append(mean)
        covariances.append(covariance)
        labels.append(y)
    mean, marginal, y = torch.cat(means), torch.cat(covariances), torch.cat(labels)
    f = torch.nn.functional.pad(mean, (1, 0))
    root = la.objective.root(f, y).transpose(0, 1)[:, :, 1:].to(mean)
    companions = inputs.companions(ALONE)
    widths = CavityWidths(predictor, CONTRASTS, root, inputs, companions, ALONE)
    return marginal, widths, companions


def brute_force(make, rows, members, n, delta=DELTA):
    """An example's covariance by a posterior that was fitted without these."""
    rest = [row for i, row in enumerate(rows) if i not in members]
    la = fitted(make, rest, delta)
    x = la.fitted.by_example(next(iter(DataLoader([rows[n]], batch_size=1))))
    return Predictor(la.fitted).readout_moments(x, CONTRASTS)[1][0]


@pytest.mark.parametrize("make,data", CASES)
def test_a_width_is_that_of_a_fit_without_the_group(make, data):
    rows = data()
    la = fitted(make, rows)
    marginal, widths, companions = cavities(la, rows)
    found = widths.without(marginal, DELTA)
    assert 0 < len(companions) < len(rows)
    for n in range(len(rows)):
        expected = brute_force(make, rows, companions.get(n, [n]), n)
        torch.testing.assert_close(found[n], expected, rtol=1e-9, atol=1e-12)
        if n in companions:
            assert (found[n] - marginal[n]).diagonal().min() > 0


@pytest.mark.parametrize("make,data", CASES)
def test_one_measurement_serves_every_prior_precision(make, data):
    rows = data()
    _, widths, _ = cavities(fitted(make, rows), rows)
    other = fitted(make, rows, 40 * DELTA)
    marginal, again, _ = cavities(other, rows)
    expected = again.without(marginal, 40 * DELTA)
    torch.testing.assert_close(widths.without(marginal, 40 * DELTA), expected)


@pytest.mark.parametrize("make,data", CASES)
def test_leave_one_out_takes_these_widths(make, data, monkeypatch):
    rows, seen = data(), []
    la = fitted(make, rows)
    without = CavityWidths.without

    def watched(self, marginal, delta):
        seen.append((delta, without(self, marginal, delta)))
        return seen[-1][1]

    monkeypatch.setattr(CavityWidths, "without", watched)
    monkeypatch.setattr(examples, "CONTRADICTED", 1.0)  # the copies' labels are at random
    la.optimize_prior_precision(recentre=False)
    delta, found = next(pair for pair in seen if pair[0] > 0.1)
    _, _, companions = cavities(la, rows)
    n = min(companions)
    assert len(companions[n]) > 2
    expected = brute_force(make, rows, companions[n], n, delta)
    torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=0)


def test_what_takes_too_much_is_counted_and_leaves_its_own_out(monkeypatch):
    rows = related_pairs()
    la = fitted(rewards, rows)
    monkeypatch.setattr(cavity_widths, "BYTES", 1)
    marginal, widths, _ = cavities(la, rows)
    found = widths.without(marginal, DELTA)
    assert widths.too_many == 6
    torch.testing.assert_close(found[1], brute_force(rewards, rows, [1], 1), rtol=1e-9, atol=0)
    la.optimize_prior_precision()
    assert "6 share inputs, 6 with too many for the width" in str(la.tuning)
