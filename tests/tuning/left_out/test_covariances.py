"""Widths at training examples without what their own labels have taught."""

from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import FullLoraLaplace, FullLoraLLLaplace, LoraEF, LowRankLoraLaplace
from laplace_lora.data.distributed import ALONE
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.left_out.cavity_widths import Covariances
from laplace_lora.tuning.left_out.examples import look_at
from support.batches import loader, split_rows, token_batch
from support.models import peft_model
from support.multilabel import multilabel_loader
from support.posteriors import posterior
from support.preferences import related_pairs
from support.references import assert_near

DELTAS = (0.01, 0.3, 20.0)
LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3)


def data(**kwargs):
    return loader(lengths=LENGTHS, **kwargs)


def copies():
    rows = split_rows(token_batch(LENGTHS))
    return DataLoader([*rows, {**rows[0], "labels": torch.tensor(2)}, rows[1]], batch_size=4)


def pairs():
    return DataLoader(related_pairs(), batch_size=2)


def head(cls, likelihood, make, name="llama", outputs=3):
    """The posterior of the head alone, made by either class."""
    model = peft_model(name, num_labels=outputs)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "lora_" in key:
                tensor.requires_grad_(False)
            elif tensor.requires_grad:
                tensor.mul_(0.3)  # less sure of itself: widths are worth something
    la = cls(model, likelihood)
    la.fit(make())
    return la


def covariances(la):
    return Covariances(look_at(la.fitted, la._train_loader, ALONE, None), ALONE)


def numbers(report):
    values = asdict(report)
    moved = values.pop("recentring") or {}
    known = {key: value for key, value in values.items() if value is not None}
    return known | {f"moved_{key}": value for key, value in moved.items()}


HEADS = [
    pytest.param("classification", data, {}, id="classes"),
    pytest.param("classification", partial(data, labels=2), {"outputs": 2}, id="binary"),
    pytest.param("multilabel", multilabel_loader, {"name": "gpt2"}, id="multilabel"),
    pytest.param("regression", partial(data, likelihood="regression"), {}, id="regression"),
    pytest.param("classification", copies, {"name": "bert"}, id="copies"),
    pytest.param("reward_modeling", pairs, {"outputs": 1}, id="pairs"),
]


@pytest.mark.filterwarnings("ignore:the adapter is frozen")
@pytest.mark.parametrize("likelihood,make,kwargs", HEADS)
def test_of_a_head_both_classes_leave_the_same_out(likelihood, make, kwargs):
    both = [head(cls, likelihood, make, **kwargs) for cls in (FullLoraLaplace, FullLoraLLLaplace)]
    expected, found = (covariances(la) for la in both)
    for delta in DELTAS:
        assert_near(found(delta), expected(delta), 1e-7)
    options = {"tune_sigma_noise": True} if likelihood == "regression" else {}
    for recentre in (True, False):
        reports = []
        for la in both:
            la.optimize_prior_precision(recentre=recentre, **options)
            reports.append(numbers(la.tuning.leave_one_out))
        assert reports[1] == pytest.approx(reports[0], rel=1e-6)


def without(make, n):
    """A posterior that was fitted without an example, and the example."""
    rows = data().dataset
    la = make()
    la.fit(DataLoader([row for i, row in enumerate(rows) if i != n], batch_size=4))
    return la, {key: value[None] for key, value in rows[n].items()}


@pytest.mark.parametrize("cls", [FullLoraLaplace, FullLoraLLLaplace])
def test_a_width_is_that_of_a_fit_without_the_example(cls):
    la = posterior(cls, "bert", fit=False)
    la.fit(data())
    found = covariances(la)
    for n in (0, 4):
        other, x = without(partial(posterior, cls, "bert", fit=False), n)
        for delta in DELTAS:
            other.prior_precision = delta
            _, expected = Predictor(other.fitted).readout_moments(x, CONTRASTS)
            torch.testing.assert_close(found(delta)[n], expected[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [4, 25])
def test_of_a_sketch_what_it_has_of_an_example_is_taken_out(rank):
    la = posterior(LowRankLoraLaplace, "bert", rank=rank, fit=False)
    la.fit(data())
    found = covariances(la)
    Z = torch.cat(la.rows.tensors(), dim=1)
    span = torch.linalg.qr(Z.T[:, Z.norm(dim=1) > 1e-9 * Z.norm()]).Q
    x = token_batch(LENGTHS)
    f, blocks = Predictor(la.fitted).readout_jacobians(x, CONTRASTS)
    J = torch.cat([block.flatten(2) for block in blocks], dim=2)
    p = torch.nn.functional.pad(f, (1, 0)).softmax(-1)[:, 1:]
    hessians = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    inner = J @ span
    outer = J - inner @ span.T
    for delta in DELTAS:
        without = (Z @ span).T @ (Z @ span) - inner.mT @ hessians @ inner
        without = without + delta * torch.eye(span.shape[1])
        expected = inner @ torch.linalg.solve(without, inner.mT) + outer @ outer.mT / delta
        torch.testing.assert_close(found(delta), expected, rtol=1e-4, atol=1e-9)


def test_a_truncated_sketch_is_no_reason_for_a_width():
    reports = []
    for cls, options in ((FullLoraLaplace, {}), (LowRankLoraLaplace, {"rank": 8})):
        la = posterior(cls, "bert", fit=False, **options)
        la.fit(loader(lengths=(*LENGTHS, 2, 5)))
        la.optimize_prior_precision(recentre=False)
        reports.append(la.tuning.leave_one_out)
    whole, truncated = reports
    assert truncated.prior_precision == pytest.approx(whole.prior_precision, rel=0.05)
    assert truncated.nll == pytest.approx(whole.nll, abs=1e-3)


ESTIMATES = [{"backend_kwargs": {"stochastic": True}}, {"backend": LoraEF}]


@pytest.mark.parametrize("kwargs", ESTIMATES)
def test_where_labels_are_drawn_or_observed_nothing_is_taken_out(kwargs):
    la = posterior(FullLoraLaplace, "bert", fit=False, **kwargs)
    la.fit(data())
    found = covariances(la)
    for delta in DELTAS:
        la.prior_precision = delta
        _, expected = Predictor(la.fitted).readout_moments(token_batch(LENGTHS), CONTRASTS)
        torch.testing.assert_close(found(delta), expected, rtol=1e-4, atol=0)
