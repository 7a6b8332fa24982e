"""`la.predict`: loaders, batches and texts to probabilities and uncertainties, in order."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, KronLoraLLLaplace
from support.batches import LENGTHS, loader, token_batch
from support.models import peft_model
from support.posteriors import CLASSES, posterior
from support.preferences import pair_batch, reward_posterior, texts
from support.references import assert_near
from support.texts import word_tokenizer


def quiet(la, data, *args, **kwargs):
    return la.predict(data, *args, progress_bar=False, **kwargs)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_a_loader_gives_what_calls_give(cls, kwargs):
    la = posterior(cls, **kwargs)
    found = quiet(la, loader(3))
    whole = token_batch(LENGTHS)
    assert len(found) == len(LENGTHS) and torch.equal(found.labels, whole["labels"])
    assert_near(found.probs, la(whole))
    mean, covariance = la._glm_predictive_distribution(whole)
    assert_near([found.mean, found.covariance], [mean, covariance])
    assert_near(found.std, covariance.diagonal(dim1=1, dim2=2).sqrt())


def test_a_batch_and_a_pair_and_a_slice():
    la = posterior()
    batch = token_batch((3, 5))
    found = quiet(la, batch)
    assert_near(found.probs, la(batch))
    labels = batch.pop("labels")
    assert quiet(la, batch).labels is None
    for unlabelled in ({**batch, "labels": None}, [(batch, None)]):
        without = quiet(la, unlabelled)
        assert without.labels is None and torch.equal(without.probs, found.probs)
    pair = quiet(la, [(batch, labels)])
    assert torch.equal(pair.labels, labels)
    assert torch.equal(quiet(la, (batch, labels)).labels, labels)
    assert_near(pair[1:].probs, found.probs[1:])
    assert len(pair[torch.tensor([True, False])]) == 1


def test_links_and_calibration_are_honoured():
    la = posterior()
    batch = token_batch((3, 5))
    noise = torch.Generator().manual_seed(0)
    found = quiet(la, batch, link_approx="mc", n_samples=7, generator=noise)
    again = torch.Generator().manual_seed(0)
    assert_near(found.probs, la(batch, link_approx="mc", n_samples=7, generator=again))
    # With the link "mc" the entropy is that of the probabilities.
    assert_near(found.entropy, torch.special.entr(found.probs).sum(-1))
    la.calibrate(loader())
    assert_near(quiet(la, batch).probs, la(batch))


def test_entropy_splits_into_two_parts():
    la = posterior()
    batch = token_batch((3, 5))
    found = quiet(la, batch)
    assert (found.mutual_information > 0).all() and (found.aleatoric > 0).all()
    assert_near(found.aleatoric + found.mutual_information, found.entropy)
    la.prior_precision = 1e12
    sure = quiet(la, batch)
    assert (sure.mutual_information < 1e-6).all()
    p = la.model.eval()(batch).softmax(-1)
    assert_near(sure.entropy, torch.special.entr(p).sum(-1), 1e-5)


def test_texts_come_back_in_their_order():
    la = posterior(name="bert")
    tokenizer = word_tokenizer()
    texts = ["a b c d e f", "b", "c d e", "a a", "h g f e d"]
    found = quiet(la, texts, tokenizer, batch_size=2)
    for i, text in enumerate(texts):
        one = la(dict(tokenizer([text], return_tensors="pt")))
        assert_near(found.probs[i : i + 1], one)
    pairs = [(text, "a b") for text in texts]
    joined = quiet(la, pairs, tokenizer)
    assert_near(joined.probs[1:2], la(dict(tokenizer([("b", "a b")], return_tensors="pt"))))
    assert (joined.probs - found.probs).abs().max() > 1e-3


def test_regression_has_moments_only():
    la = KronLoraLaplace(peft_model("bert"), "regression")
    la.fit(loader(likelihood="regression"))
    found = quiet(la, loader(likelihood="regression"))
    assert found.probs is None and found.entropy is None and found.aleatoric is None
    assert found.mean.shape == (7, 3) and found.covariance.shape == (7, 3, 3)
    assert found.labels.shape == (7, 3)


def test_rewards_and_preferences():
    la = reward_posterior()
    pairs, single_texts = pair_batch(), texts((3, 5), seed=0)
    found = quiet(la, pairs)
    assert_near(found.probs, la(pairs))
    difference, variance = la.reward_difference(pairs)
    assert_near([found.mean[:, 0], found.covariance[:, 0, 0]], [difference, variance])
    assert (found.mutual_information > 0).all() and found.labels is None
    single = quiet(la, single_texts)
    assert single.probs is None and single.mean.shape == (2, 1)
    assert_near([single.mean, single.covariance], list(la(single_texts)))


def test_a_language_models_posterior_is_sent_elsewhere():
    la = KronLoraLaplace(
        peft_model("llama-lm"), "language_modeling", backend_kwargs={"num_samples": 1}
    )
    batch = token_batch((4, 4))
    batch["labels"] = batch["input_ids"]
    examples = [{k: v[i] for k, v in batch.items()} for i in range(2)]
    la.fit(DataLoader(examples, batch_size=2))
    with pytest.raises(ValueError, match=r"generation\.score"):
        quiet(la, batch)


def test_last_layer_posteriors_predict_too():
    la = KronLoraLLLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    assert_near(quiet(la, loader()).probs, la(token_batch(LENGTHS)))


@pytest.mark.parametrize(
    "data,tokenizer,error,message",
    [
        ([], None, ValueError, "nothing to predict"),
        (["a b"], None, ValueError, "texts need `tokenizer`"),
        (["a b"], word_tokenizer(pad=None), ValueError, "no padding token"),
        (3, None, TypeError, "a loader, a batch or texts, got int"),
    ],
)
def test_bad_input_is_refused(data, tokenizer, error, message):
    with pytest.raises(error, match=message):
        quiet(posterior(), data, tokenizer)


def test_an_unfitted_posterior_is_refused():
    with pytest.raises(AttributeError, match="not fitted"):
        quiet(posterior(fit=False), loader())
    with pytest.raises(ValueError, match="link_approx"):
        quiet(posterior(), loader(), link_approx="logit")


def test_what_all_logits_share_hides_no_contrast():
    """Of a trained head its variance has no bound but the prior's: here some 37000 beside 10."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = peft_model("bert", dtype=dtype)
        la = KronLoraLaplace(model, "classification", prior_precision=1e-5)
        la.fit(loader())
        found[dtype] = la.predict(token_batch((4, 2, 5)))
    single, double = found.values()
    assert double.covariance[0].diagonal().min() > 1e4
    assert (single.probs - double.probs).abs().max() < 6e-6
    assert_near(single.mutual_information.double(), double.mutual_information, 1e-4)
    assert_near(single.covariance.double(), double.covariance, 1e-5)
