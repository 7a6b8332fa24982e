"""Class probabilities of tokens: exact moments, samples, layouts, words."""

import logging

import pytest
import torch

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.information import entropies
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.quadrature import ENTROPY_POINTS, normal_points
from laplace_lora.predictive import token_classes
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.predictive.sample_set import SampleSet
from laplace_lora.predictive.token_classes import TokenClassPredictor
from support.generation import seeded
from support.opaque import Opaque
from support.references import assert_near, explicit_jacobians
from support.texts import word_tokenizer
from support.tokens import TAGGERS, tagged_batch, tagged_loader, tagged_posterior, tagger

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
BATCH = tagged_batch((4, 6, 3), pad_to=8, seed=5)
X = {key: value for key, value in BATCH.items() if key != "labels"}
REAL = X["attention_mask"].bool()
POSTERIORS = [
    (KronLoraLaplace, {"factor_rank": None}),
    (KronLoraLaplace, {"factor_rank": 2, "low_rank_threshold": 4}),
    (DiagLoraLaplace, {}),
    (FullLoraLaplace, {}),
]


def explicit_moments(la, contrasts=False):
    """Mean and covariance of every token's logits, from a loop of Jacobians and a dense inverse."""
    f = la.model.eval()(X).detach()
    J = torch.cat([J.flatten(2) for J in explicit_jacobians(la.model, X)], -1)
    if contrasts:
        f, J = f[:, 1:] - f[:, :1], J[:, 1:] - J[:, :1]
    P = la.posterior_precision
    covariance = (1 / P).diag() if isinstance(P, torch.Tensor) else P.to_matrix(-1)
    return f, torch.einsum("ncp,pq,nkq->nck", J, covariance, J)


@pytest.mark.parametrize("room", [1, 2**27])
@pytest.mark.parametrize("cls, options", POSTERIORS)
def test_moments_equal_explicit_jacobians(cls, options, room, monkeypatch):
    """With one token of each text at a time, and with all."""
    monkeypatch.setattr(token_classes, "ROOM", room)
    la = tagged_posterior(cls, prior_precision=0.6, **options)
    predictor = TokenClassPredictor(la.fitted, method="exact")
    for readout, contrasts in ((LOGITS, False), (CONTRASTS, True)):
        for ours, theirs in zip(
            predictor.moments(BATCH, readout), explicit_moments(la, contrasts), strict=True
        ):
            assert_near(ours, theirs)


@pytest.mark.parametrize("name", TAGGERS)
def test_exact_probabilities_are_the_integral_over_the_contrasts(name):
    la = tagged_posterior(name=name, prior_precision=0.6, factor_rank=None)
    mean, covariance = explicit_moments(la, contrasts=True)
    expected = Link("quadrature").log_probabilities(mean, covariance, relative=True).exp()
    probs = la(X, method="exact")
    assert probs.shape == (3, 8, 3)
    torch.testing.assert_close(probs[REAL], expected, atol=1e-3, rtol=0)  # other points
    predictions = la.predict(X, method="exact")
    assert_near(predictions.probs, probs)
    points = normal_points(ENTROPY_POINTS, 2).double()
    total, information = entropies(mean, covariance, points, relative=True)
    assert_near(predictions.entropy[REAL], total)
    assert_near(predictions.aleatoric[REAL], total - information)
    assert_near(predictions.map_probs[REAL], la.model(X).detach().softmax(-1))


@pytest.mark.parametrize("name", TAGGERS)
def test_tangents_are_jacobians_times_directions(name):
    la = tagged_posterior(name=name)
    mean, tangents = LinearSamples(la.fitted, 6, seeded()).tangents(X, LOGITS)
    directions = SampleSet(la.fitted, 6, seeded()).directions
    J = torch.cat([J.flatten(2) for J in explicit_jacobians(la.model, X)], -1)
    assert_near(mean, la.model.eval()(X).detach())
    assert_near(tangents, torch.einsum("ncp,kp->knc", J, directions), 1e-5)


def test_samples_agree_with_the_exact_moments():
    la = tagged_posterior(prior_precision=2.0)
    exact = la.predict(X, method="exact")
    sampled = la.predict(X, method="sampled", n_samples=2000)
    assert_near(sampled.map_probs, exact.map_probs, 1e-10)
    torch.testing.assert_close(sampled.probs, exact.probs, atol=0.02, rtol=0)
    information = sampled.mutual_information, exact.mutual_information
    torch.testing.assert_close(*information, atol=0.03, rtol=0.1)
    assert torch.equal(la(X), la(X, method="sampled"))  # and the default
    assert not torch.equal(la(X), la(X, generator=seeded(1)))


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_batches_and_padding_change_nothing(method):
    la = tagged_posterior()
    together = la.predict(BATCH, method=method)
    for width in (6, 9):
        batch = tagged_batch((4, 6, 3), pad_to=width, seed=5)
        alone = la.predict(tagged_loader(1, batch), method=method)
        real = batch["attention_mask"].bool()
        assert torch.equal(alone.mask, real)
        for name in ("probs", "map_probs", "entropy", "mutual_information", "labels"):
            ours, theirs = getattr(alone, name), getattr(together, name)
            assert_near(ours[real].double(), theirs[REAL].double(), 1e-5)
    assert not together.probs[~REAL].any() and not together.entropy[~REAL].any()


def test_another_link_and_sampled_weights():
    la = tagged_posterior()
    mean, covariance = TokenClassPredictor(la.fitted, method="exact").moments(X, LOGITS)
    expected = Link("probit").log_probabilities(mean, covariance).exp()
    assert_near(la(X, link_approx="probit")[REAL], expected)
    torch.testing.assert_close(
        la(X, link_approx="mc", n_samples=4000), la(X, method="exact"), atol=0.02, rtol=0
    )
    la.prior_precision = 1e8
    la.model.eval()
    networks = la(X, pred_type="nn", link_approx="mc", n_samples=3, generator=seeded())
    assert_near(networks[REAL], la.model(X).detach().softmax(-1), 0.02)
    assert not networks[~REAL].any()
    assert la.predictive_samples(BATCH, pred_type="nn", n_samples=2).shape == (2, 10, 3)


def test_a_model_without_forward_derivative_is_predicted_exactly(caplog):
    model = tagger()
    model.base_model.model.dropout = Opaque()
    la = tagged_posterior(model=model)
    with caplog.at_level(logging.INFO, logger="laplace_lora"):
        assert_near(la(X), la(X, method="exact"))
    assert "from exact moments" in caplog.text
    with pytest.raises(ValueError, match="without forward derivative"):
        la(X, method="sampled")


def test_texts_rows_and_loaders_keep_their_order():
    la = tagged_posterior()
    tokenizer = word_tokenizer()
    texts = ["a b c d", "e f", "a c e g h"]
    by_text = la.predict(texts, tokenizer, batch_size=2)
    encoded = [tokenizer(text) for text in texts]
    labelled = [{**row, "labels": [-100, *[1] * (len(row["input_ids"]) - 1)]} for row in encoded]
    by_row = la.predict(labelled, tokenizer, batch_size=2)
    assert by_text.labels is None and by_text.mask.sum(1).tolist() == [4, 2, 5]
    assert_near(by_row.probs, by_text.probs, 1e-6)
    assert by_row.labels.tolist()[1] == [-100, 1, -100, -100, -100]
    assert_near(la.predict(texts[1], tokenizer).probs[0], by_text.probs[1, :2], 1e-6)
    pair = la.predict([(X, BATCH["labels"])])
    assert torch.equal(pair.labels, BATCH["labels"])
    with pytest.raises(ValueError, match="labels of shape"):
        la.predict([{**encoded[0], "labels": [1]}], tokenizer)
    with pytest.raises(ValueError, match="nothing to predict"):
        la.predict([])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_come_padded_have_labels_for_all_their_tokens_or_the_real_ones(side):
    la, tokenizer = tagged_posterior(name="llama"), word_tokenizer()
    tokenizer.padding_side = side
    texts = ["a b c d", "e f"]
    bare = [{**tokenizer(text), "labels": [*range(len(text.split()))]} for text in texts]
    for row in bare:
        row["labels"] = [label % 3 for label in row["labels"]]
    expected = la.predict(bare, tokenizer, batch_size=1)
    for width, pads in ((6, tokenizer), (6, None), (3, tokenizer)):
        rows = []
        for text, short in zip(texts, bare, strict=True):
            row = tokenizer(text, padding="max_length", max_length=max(width, len(text.split())))
            real = torch.tensor(row["attention_mask"]).bool()
            labels = torch.full(real.shape, -100)
            labels[real] = torch.tensor(short["labels"])
            rows.append({**row, "labels": labels.tolist()})
        few = [{**row, "labels": short["labels"]} for row, short in zip(rows, bare, strict=True)]
        for given in (rows, few):
            found = la.predict(given, pads)
            for n, short in enumerate(bare):
                assert found.labels[n, found.mask[n]].tolist() == short["labels"]
                ours, theirs = (p.probs[n, p.mask[n]] for p in (found, expected))
                assert_near(ours, theirs, 1e-5)


def test_words_are_predicted_by_their_first_tokens():
    la = tagged_posterior()
    predictions = la.predict(BATCH)
    by_text = [[None, 0, 0, 1], [None, 0, 1, 1, 2, None], [0, 2, 2]]
    words = predictions.words(by_text)
    padded = [[*ids, *[None] * (8 - len(ids))] for ids in by_text]
    expected = [[(0, 1), (0, 3)], [(1, 1), (1, 2), (1, 4)], [(2, 0), None, (2, 1)]]
    assert words.mask.tolist() == [[True, True, False], [True] * 3, [True, False, True]]
    for again in (words, predictions.words(padded)):
        for n, places in enumerate(expected):
            for word, place in enumerate(places):
                if place is not None:
                    assert torch.equal(again.probs[n, word], predictions.probs[place])
                    assert again.labels[n, word] == predictions.labels[place]
    assert words.labels[0, 2] == -100 and not words.probs[0, 2].any()
    with pytest.raises(ValueError, match="3 texts need as many"):
        predictions.words(by_text[:2])
    with pytest.raises(ValueError, match="where the text has padding"):
        predictions.words([[None, 0, 0, 1, 2], *by_text[1:]])
    with pytest.raises(ValueError, match="not in order"):
        predictions.words([[0, 1, 0, 1], *by_text[1:]])


def test_results_show_themselves():
    la = tagged_posterior()
    predictions = la.predict(BATCH)
    assert str(predictions).startswith("TokenClassPredictions of 3 texts, 13 tokens, 3 classes")
    assert "<table>" in predictions._repr_html_()
    texts = predictions.to_dict()["texts"]
    assert [len(text) for text in texts] == [4, 6, 3]
    assert texts[1][2]["token"] == 2 and texts[1][2]["label"] == int(BATCH["labels"][1, 2])
    assert texts[1][2]["prob_1"] == pytest.approx(float(predictions.probs[1, 2, 1]))
    frame = predictions.to_pandas()
    assert len(frame) == 13 and frame["entropy"].sum() == pytest.approx(
        float(predictions.entropy.sum())
    )
    some = predictions[[2, 0]]
    assert torch.equal(some.probs[0], predictions.probs[2]) and len(some) == 2


def test_options_that_do_not_go_together_are_refused():
    la = tagged_posterior()
    for options, message in (
        ({"method": "often"}, "method must be one of"),
        ({"method": "sampled", "link_approx": "probit"}, "needs method='exact'"),
        ({"joint": True}, "mean nothing to token classifiers"),
        ({"pred_type": "nn"}, "which samples weights"),
        ({"pred_type": "map"}, "must be 'glm'"),
        ({"link_approx": "logit"}, "link_approx must be one of"),
        ({"n_samples": 0}, "n_samples must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            la(X, **options)
    with pytest.raises(TypeError, match="'input_ids'"):
        la(X["input_ids"])
    with pytest.raises(ValueError, match="enable_backprop"):
        tagged_posterior(enable_backprop=True)(X)
    with pytest.raises(ValueError, match="attention mask of shape"):
        la({**X, "attention_mask": X["attention_mask"][:, :-1]})
