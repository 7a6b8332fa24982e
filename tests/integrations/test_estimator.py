"""A posterior as a scikit-learn classifier."""

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibrationDisplay
from sklearn.exceptions import NotFittedError
from sklearn.metrics import get_scorer
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.utils.validation import check_is_fitted
from torch.nn import functional as F

from laplace_lora import KronLoraLaplace
from laplace_lora.integrations.estimator import LaplaceClassifier
from support.models import TARGETS, peft_model
from support.multilabel import multilabel_posterior
from support.texts import word_tokenizer

TEXTS = ["a b c", "d e", "f g h a b", "c", "h h", "b a"]
LABELS = ["good", "bad", "good", "fair", "fair", "bad"]
NAMES = ["bad", "fair", "good"]


@pytest.fixture(scope="module")
def classifier():
    la = KronLoraLaplace(peft_model("bert").float(), "classification")
    made = LaplaceClassifier(la, word_tokenizer(), NAMES, batch_size=4)
    with pytest.raises(NotFittedError):
        check_is_fitted(made)
    return made.fit(TEXTS, LABELS)


def test_probabilities_are_those_of_predict(classifier):
    check_is_fitted(classifier)
    found = classifier.posterior.predict(TEXTS, word_tokenizer()).probs
    p = classifier.predict_proba(np.array(TEXTS))
    assert np.abs(p - found.numpy()).max() < 1e-5
    assert classifier.predict(TEXTS).tolist() == [NAMES[i] for i in found.argmax(1).tolist()]


def test_fit_is_that_of_the_posterior(classifier):
    la = KronLoraLaplace(classifier.posterior.logits_model, "classification")
    tokenizer = word_tokenizer()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = torch.tensor([NAMES.index(label) for label in LABELS])
    batches = torch.utils.data.DataLoader(
        [{**{k: v[n] for k, v in batch.items()}, "labels": labels[n]} for n in range(6)], 3
    )
    la.fit(batches)
    la.optimize_prior_precision(train_loader=batches)
    assert float(la.prior_precision) == pytest.approx(
        float(classifier.posterior.prior_precision), rel=0.01
    )


def test_scikit_learns_tools_take_it():
    la = KronLoraLaplace(peft_model("bert", num_labels=2).float(), "classification")
    classifier = LaplaceClassifier(la, word_tokenizer())
    labels = [0, 1, 0, 1, 1, 0]
    classifier.fit(TEXTS, labels)
    assert is_classifier(classifier) and classifier.classes_.tolist() == [0, 1]
    loss = get_scorer("neg_log_loss")(classifier, TEXTS, labels)
    p = classifier.predict_proba(TEXTS)[range(6), labels]
    assert loss == pytest.approx(np.log(p).mean())
    shown = CalibrationDisplay.from_estimator(classifier, TEXTS, labels, n_bins=2)
    assert len(shown.prob_pred)


def test_scores_of_names_in_any_order_are_those_of_the_labels():
    la = KronLoraLaplace(peft_model("bert"), "classification")
    names = ["pos", "neutral", "neg"]
    y = [names[k] for k in (0, 2, 1, 0, 2, 1)][: len(TEXTS)]
    made = LaplaceClassifier(la, word_tokenizer(), names, batch_size=4).fit(TEXTS, y)
    probs = la.predict(TEXTS, word_tokenizer()).probs
    own = probs[range(len(y)), [names.index(label) for label in y]]
    score = get_scorer("neg_log_loss")(made, TEXTS, y)
    assert score == pytest.approx(float(own.log().mean()))
    assert made.classes_.tolist() == ["neg", "neutral", "pos"]
    best = [names[k] for k in probs.argmax(1).tolist()]
    assert made.predict(TEXTS).tolist() == best


def test_unknown_labels_are_refused(classifier):
    with pytest.raises(ValueError, match="none of the classes"):
        classifier.fit(TEXTS, ["good", "bad", "ugly", "bad", "bad", "bad"])


def test_classes_that_scikit_learn_numbers_are_those_in_sorted_order():
    names = ["pos", "neutral", "neg"]
    y = np.array([names[k] for k in (0, 2, 1, 0, 2, 1)])
    made = LaplaceClassifier(
        KronLoraLaplace(peft_model("bert"), "classification"), word_tokenizer(), names
    )
    folds = KFold(2)
    found = cross_val_predict(made, TEXTS, y, cv=folds, method="predict_proba")
    texts = np.array(TEXTS)
    for fitted_on, held_out in folds.split(TEXTS):
        fold = clone(made).fit(texts[fitted_on], y[fitted_on])
        assert np.abs(found[held_out] - fold.predict_proba(texts[held_out])).max() < 1e-6
    numbered = clone(made).fit(TEXTS, [2, 0, 1, 2, 0, 1])
    best = clone(made).fit(TEXTS, y).predict(TEXTS)
    assert numbered.classes_.tolist() == [0, 1, 2]
    assert np.array(sorted(names))[numbered.predict(TEXTS)].tolist() == best.tolist()
    assert numbered.fit(TEXTS, y).classes_.tolist() == sorted(names)
    with pytest.raises(ValueError, match="every training fold needs all"):
        made.fit(TEXTS, [0, 1, 0, 1, 0, 1])


def test_clones_are_not_fitted_and_share_the_model(classifier):
    before = classifier.predict_proba(TEXTS)
    made = clone(classifier)
    with pytest.raises(NotFittedError):
        check_is_fitted(made)
    assert made.posterior.logits_model is classifier.posterior.logits_model
    made.fit(TEXTS, LABELS[::-1])
    assert np.abs(made.predict_proba(TEXTS) - before).max() > 1e-6
    assert np.array_equal(classifier.predict_proba(TEXTS), before)
    again = clone(made).fit(TEXTS, LABELS).predict_proba(TEXTS)
    assert np.abs(again - before).max() < 1e-4  # the search began at another prior


def test_numbers_that_may_be_classes_or_their_places_are_said_to_be_unclear():
    """A fold of ``cross_val_predict`` without the first class numbers the others from one."""
    made = LaplaceClassifier(
        KronLoraLaplace(peft_model("bert"), "classification"), word_tokenizer(), [1, 2, 3]
    )
    with pytest.warns(UserWarning, match=r"labels \[1, 2\] may be classes, or scikit-learn's"):
        made.fit(TEXTS, [1, 2, 1, 2, 1, 2])
    assert made.classes_.tolist() == [1, 2, 3]
    made.fit(TEXTS, [1, 2, 3, 2, 1, 2])
    clone(made).set_params(labels=[0, 1, 2]).fit(TEXTS, [1, 2, 1, 2, 1, 2])


def test_classes_may_be_named_in_any_container():
    pandas = pytest.importorskip("pandas")
    for labels, y in ((np.array(NAMES), LABELS), (pandas.Series([4, 6, 9]), [9, 4, 9, 6, 6, 4])):
        la = KronLoraLaplace(peft_model("bert"), "classification")
        made = clone(LaplaceClassifier(la, word_tokenizer(), labels)).fit(TEXTS, y)
        assert made.classes_.tolist() == list(labels)
        assert set(made.predict(TEXTS)) <= set(y)
        with pytest.raises(ValueError, match="none of the classes"):
            made.fit(TEXTS, ["ugly"] * len(TEXTS))
    twice = clone(made).set_params(labels=pandas.Index(["good", "good", "bad"]))
    with pytest.raises(ValueError, match=r"labels=\['good', 'good', 'bad'\] must name each"):
        twice.fit(TEXTS, LABELS)


def test_every_text_needs_a_label(classifier):
    with pytest.raises(ValueError, match=r"texts do not fit 1 labels"):
        classifier.fit(TEXTS, LABELS[:1])


def test_names_that_are_not_those_of_the_outputs_are_refused(classifier):
    la, tokenizer = classifier.posterior, word_tokenizer()
    for labels in (["bad", "good"], [*NAMES, "best"], ["good", "good", "bad"]):
        wrong = LaplaceClassifier(la, tokenizer, labels)
        with pytest.raises(ValueError, match="name each of the model's 3 classes once"):
            wrong.fit(TEXTS, [labels[0]] * len(TEXTS))
        with pytest.raises(ValueError, match="name each of the model's 3 classes once"):
            wrong.predict(TEXTS)
    with pytest.raises(ValueError, match=r"labels such as 'good'.*name them with `labels`"):
        LaplaceClassifier(la, tokenizer).fit(TEXTS, LABELS)


def test_pairs_of_texts_in_an_array_are_fitted_as_they_are_predicted():
    pairs = [(text, "c d") for text in TEXTS]
    found = []
    for X in (pairs, np.array(pairs)):
        la = KronLoraLaplace(peft_model("bert").float(), "classification")
        made = LaplaceClassifier(la, word_tokenizer(), NAMES, batch_size=4).fit(X, LABELS)
        found.append(made.predict_proba(X))
    assert np.array_equal(*found)


def test_texts_may_be_columns_of_a_data_frame(classifier):
    pandas = pytest.importorskip("pandas")
    p = classifier.predict_proba(TEXTS)
    for X in (pandas.DataFrame({"text": TEXTS}), np.array(TEXTS)[:, None]):
        assert np.abs(classifier.predict_proba(X) - p).max() < 1e-6
    pairs = pandas.DataFrame({"text": TEXTS, "other": TEXTS[::-1]})
    expected = classifier.predict_proba(list(zip(TEXTS, TEXTS[::-1], strict=True)))
    assert np.abs(classifier.predict_proba(pairs) - expected).max() < 1e-6


def test_a_decoders_prompts_are_fitted_whole_or_not_at_all():
    tokenizer, long = word_tokenizer(), "a b c d e f g h a b"
    la = KronLoraLaplace(peft_model("llama-lm").eval(), "classification", target_ids=TARGETS)
    made = LaplaceClassifier(la, tokenizer, NAMES, batch_size=2)
    texts = [*TEXTS[:5], long]
    made.fit(texts, LABELS)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    y = torch.tensor([NAMES.index(label) for label in LABELS])
    loss = F.cross_entropy(la.logits_model(batch).detach(), y, reduction="sum")
    assert float(la.loss) == pytest.approx(float(loss)) and la.n_data == 6
    tokenizer.model_max_length = 6
    for call in (lambda: made.fit(texts, LABELS), lambda: made.predict(texts)):
        with pytest.raises(ValueError, match=r"texts \[5\] have more tokens than the tokenizer's"):
            call()


@pytest.mark.parametrize("missing", [None, float("nan"), 3])
def test_missing_texts_are_named(classifier, missing):
    texts = [*TEXTS[:2], missing, *TEXTS[3:]]
    for call in (lambda: classifier.fit(texts, LABELS), lambda: classifier.predict(texts)):
        with pytest.raises(TypeError, match=rf"items \[2\] are neither.*such as {missing}"):
            call()


def test_texts_without_tokens_are_not_fitted(classifier):
    with pytest.raises(ValueError, match=r"rows \[1\] have no tokens"):
        classifier.fit([TEXTS[0], "", *TEXTS[2:]], LABELS)


def test_whole_numbers_may_be_floats():
    """As pandas reads a column of labels of which some are missing elsewhere."""
    made = [
        LaplaceClassifier(KronLoraLaplace(peft_model("bert"), "classification"), word_tokenizer())
        for _ in range(2)
    ]
    labels = np.array([0, 1, 2, 1, 1, 0])
    found, expected = (
        classifier.fit(TEXTS, y).predict_proba(TEXTS)
        for classifier, y in zip(made, (labels.astype(float), labels), strict=True)
    )
    assert np.array_equal(found, expected)
    with pytest.raises(ValueError, match="integer label"):
        made[0].fit(TEXTS, labels + 0.5)


def test_a_posterior_of_anything_but_classes_is_refused():
    classifier = LaplaceClassifier(multilabel_posterior(), word_tokenizer())
    for call in (lambda: classifier.fit(TEXTS, LABELS), lambda: classifier.predict(TEXTS)):
        with pytest.raises(ValueError, match="needs a posterior with likelihood='classification'"):
            call()
