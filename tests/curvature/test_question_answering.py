"""Curvature of question-answering models: two softmaxes over the tokens of a text."""

import pytest
import torch
from torch.nn import functional as F

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LoraEF
from laplace_lora.likelihoods import question_answering, roots
from laplace_lora.likelihoods.question_answering import halves, joined
from support.references import assert_near
from support.spans import EXACT, READERS, question_batch, question_loader, span_ggn, span_posterior

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def labels(batch):
    return torch.stack([batch["start_positions"], batch["end_positions"]], dim=-1)


def test_start_and_end_come_apart_and_together():
    f = torch.arange(24.0).reshape(2, 12)
    assert halves(f).tolist() == [*f[0].reshape(2, 6).tolist(), *f[1].reshape(2, 6).tolist()]
    assert torch.equal(joined(halves(torch.stack([f, -f]))), torch.stack([f, -f]))


@pytest.mark.parametrize("name", READERS)
def test_the_exact_curvature_is_that_of_two_softmaxes(name):
    la = span_posterior(name=name, fit=False, **EXACT)
    la.model.eval()
    batch = question_batch()
    loss, ggn = la.backend.full(batch, labels(batch))
    expected = span_ggn(la, batch)
    assert_near(ggn, expected)
    assert_near(la.backend.diag(batch, labels(batch))[1], expected.diagonal())
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    nll = 0
    for n, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        out = la.model.model(input_ids=inputs["input_ids"][n : n + 1, :length])
        for logits, at in ((out.start_logits, "start"), (out.end_logits, "end")):
            nll += F.cross_entropy(logits, batch[f"{at}_positions"][n : n + 1])
    assert_near(loss, nll.detach())


def test_drawn_spans_are_the_default_and_right_on_average():
    """Start and end are drawn independently, so that their cross terms vanish."""
    la = span_posterior(fit=False, backend_kwargs={"num_samples": 400})
    la.model.eval()
    assert la.backend.stochastic
    batch = question_batch()
    torch.manual_seed(0)
    _, drawn = la.backend.full(batch, labels(batch))
    expected = span_ggn(la, batch)
    assert (drawn - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
@pytest.mark.parametrize("kind", ["exact", "empirical", "drawn"])
def test_the_fit_does_not_depend_on_batches_and_padding(cls, kind, monkeypatch):
    if kind == "drawn":  # as if chance always chose the likeliest token
        first = lambda p, samples: p.topk(1).indices  # noqa: E731
        monkeypatch.setattr(roots, "drawn_labels", first)
    options = {"exact": EXACT, "empirical": {"backend": LoraEF}, "drawn": {}}[kind]
    evidence = []
    for data in (
        question_loader(3),
        question_loader(1),
        question_loader(2, question_batch(pad_to=9)),
    ):
        la = span_posterior(cls, fit=False, **options)
        la.fit(data)
        assert la.n_data == 3
        evidence.append(la.log_marginal_likelihood())
    for other in evidence[1:]:
        assert_near(other, evidence[0])


def test_exact_columns_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(question_answering, "LARGEST_ROOT", 100)
    with pytest.raises(ValueError, match=r"texts of 7 tokens takes 12 backward passes"):
        span_posterior(**EXACT)
