"""Curvature of token classifiers: summed over labelled tokens, exact or from drawn labels."""

import pytest
import torch
from torch.nn import functional as F

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LoraEF
from laplace_lora.likelihoods import roots, token_classification
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.token_classification import class_labels
from support.language import language_posterior, text_batch, text_loader
from support.references import assert_near
from support.tokens import (
    EXACT,
    TAGGERS,
    padded_tagger,
    tag_ggn,
    tagged_batch,
    tagged_loader,
    tagged_posterior,
    tagger,
)

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.mark.parametrize("name", TAGGERS)
def test_the_exact_curvature_is_the_sum_over_tokens(name):
    la = tagged_posterior(name=name, fit=False, **EXACT)
    la.model.eval()
    batch = tagged_batch((4, 3))
    y = class_labels(batch, batch["labels"])
    loss, ggn = la.backend.full(batch, y)
    expected = tag_ggn(la, batch)
    assert_near(ggn, expected)
    assert_near(la.backend.diag(batch, y)[1], expected.diagonal())
    assert_near(loss, F.cross_entropy(la.model(batch), y[y != IGNORED], reduction="sum"))


def test_a_batch_without_labels_adds_an_example_and_no_curvature():
    batch = tagged_batch((4, 6, 3))
    batch["labels"][1] = IGNORED
    alone, together = (tagged_posterior(fit=False, **EXACT) for _ in range(2))
    alone.fit(tagged_loader(1, batch))
    together.fit(tagged_loader(3, batch))
    assert alone.n_data == 3
    assert_near(alone.log_marginal_likelihood(), together.log_marginal_likelihood())


def test_the_logits_are_the_models_own_at_the_tokens_that_count():
    la = tagged_posterior(fit=False)
    la.model.eval()
    batch = tagged_batch(pad_to=8)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    own = la.model.model(**inputs).logits
    assert_near(la.model(batch), own[batch["labels"] != IGNORED])
    assert_near(la.model(inputs), own[batch["attention_mask"].bool()])


def test_drawn_labels_are_the_default_and_right_on_average():
    """Also across the tokens of a text, which meet in one gradient."""
    la = tagged_posterior(fit=False, backend_kwargs={"num_samples": 400})
    la.model.eval()
    assert la.backend.stochastic
    batch = tagged_batch((3,))
    torch.manual_seed(0)
    _, drawn = la.backend.full(batch, class_labels(batch, batch["labels"]))
    expected = tag_ggn(la, batch)
    assert (drawn - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
@pytest.mark.parametrize("kind", ["exact", "empirical", "drawn"])
def test_the_fit_does_not_depend_on_batches_and_padding(cls, kind, monkeypatch):
    if kind == "drawn":  # as if chance always chose the least likely class
        third = lambda p, samples: p.topk(3).indices[:, -1:]  # noqa: E731
        monkeypatch.setattr(roots, "drawn_labels", third)
    options = {"exact": EXACT, "empirical": {"backend": LoraEF}, "drawn": {}}[kind]
    evidence = []
    wide = tagged_batch(pad_to=9)
    for data in (tagged_loader(3), tagged_loader(1), tagged_loader(2, wide)):
        la = tagged_posterior(cls, fit=False, **options)
        la.fit(data)
        assert la.n_data == 3
        evidence.append(la.log_marginal_likelihood())
    for other in evidence[1:]:
        assert_near(other, evidence[0])


@pytest.mark.parametrize("filling", [float("nan"), float("inf")])
def test_what_is_not_finite_at_padding_changes_nothing(filling):
    evidence, predictions = [], []
    for value in (0.0, filling):
        la = tagged_posterior(model=padded_tagger(value), fit=False, **EXACT)
        la.fit(tagged_loader(3))
        evidence.append(la.log_marginal_likelihood())
        ways = [la(tagged_batch(pad_to=8), method=method) for method in ("exact", "sampled")]
        predictions.append(torch.stack(ways))
    assert_near(*evidence)
    assert_near(*predictions)
    assert not predictions[1][:, :, -1].any()


def test_a_text_without_labels_counts_as_one():
    batch = tagged_batch()
    batch["labels"][1] = IGNORED
    ours, alone = (tagged_posterior(fit=False, backend=LoraEF) for _ in range(2))
    ours.fit(tagged_loader(3, batch))
    alone.fit(tagged_loader(1, batch))
    assert ours.n_data == alone.n_data == 3
    assert_near(alone.log_marginal_likelihood(), ours.log_marginal_likelihood())
    with pytest.raises(ValueError, match="all are -100"):
        batch["labels"][:] = IGNORED
        ours.fit(tagged_loader(3, batch))


@pytest.mark.parametrize(
    "posterior, loader",
    [
        (language_posterior, text_loader),
        (tagged_posterior, tagged_loader),
    ],
)
def test_as_many_tokens_as_texts_are_not_taken_for_texts(posterior, loader):
    """Two labels in the first text, one in the second, none in the third."""
    batch = text_batch((4, 6, 3), (1, 1, 1))
    batch["labels"][:] = IGNORED
    batch["labels"][0, 1:3] = batch["labels"][1, 3] = 1
    la, alone = posterior(fit=False, backend=LoraEF), posterior(fit=False, backend=LoraEF)
    la.fit(loader(3, batch))
    alone.fit(loader(1, batch))
    assert_near(la.log_marginal_likelihood(), alone.log_marginal_likelihood())


def test_a_head_that_is_not_trained_is_left_out():
    model = tagger()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    la = tagged_posterior(model=model, **EXACT)
    assert not any("classifier" in name for name in la.block_names)


def test_exact_columns_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(token_classification, "LARGEST_ROOT", 100)
    with pytest.raises(ValueError, match=r"takes 10 backward passes, 2 for each of 5 tokens"):
        tagged_posterior(**EXACT)
