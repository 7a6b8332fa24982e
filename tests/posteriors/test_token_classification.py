"""Posteriors of token classifiers: tuning, calibration, evaluation, files, refusals."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import (
    DiagLoraLLLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LogitsModel,
    LowRankLoraLaplace,
)
from laplace_lora.evaluation import evaluate
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.token_classifier import TokenClassifier
from laplace_lora.tuning.validation import calibration_search, sampled_rows
from laplace_lora.tuning.validation.calibration_search import Found
from support.batches import rows
from support.models import peft_model
from support.references import assert_near
from support.tokens import EXACT, tagged_batch, tagged_loader, tagged_posterior, tagger

VALIDATION = tagged_batch((5, 4, 6, 3, 5, 6), seed=7)


def label_nll(la, batch=VALIDATION):
    """Mean NLL of the labelled tokens."""
    counted = batch["labels"] != IGNORED
    p = la.predict(batch).probs[counted]
    return -p[range(len(p)), batch["labels"][counted]].log().mean()


def test_it_fits_tunes_and_comes_back_from_a_file(tmp_path):
    la = tagged_posterior()
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(method="marglik", correction=False)
    assert la.log_marginal_likelihood() >= before
    with pytest.warns(UserWarning, match="no maximum where it is credible"):
        la.optimize_prior_precision(method="marglik")
    assert la.log_marginal_likelihood(correction=True).isfinite()
    assert "token_classification by BertForTokenClassification, 3 outputs" in str(la)
    la.calibrate(tagged_loader(3, VALIDATION))
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.model.model, tmp_path)
    assert isinstance(again.model, TokenClassifier) and again.likelihood == "token_classification"
    assert torch.equal(again.predict(VALIDATION).probs, la.predict(VALIDATION).probs)
    assert la.estimate_memory(tagged_batch()).jacobian < 2**20


@pytest.mark.parametrize("cls", [FullLoraLaplace, LowRankLoraLaplace])
def test_other_structures_fit_as_well(cls):
    la = tagged_posterior(cls)
    assert la.predict(VALIDATION).mutual_information.sum() > 0


def test_eigenvalues_are_corrected_by_a_second_pass():
    factors, corrected = (
        tagged_posterior(eigenvalue_correction=value, **EXACT) for value in (False, True)
    )
    assert corrected.log_marginal_likelihood() != factors.log_marginal_likelihood()


def test_two_fits_add_up():
    batch = tagged_batch()
    whole = tagged_posterior(**EXACT)
    parts = tagged_posterior(fit=False, **EXACT)
    for n in range(3):
        parts.fit(DataLoader([rows(batch, n)], batch_size=1), override=n == 0)
    assert_near(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())


def test_the_default_tuning_keeps_the_predictive_near_the_map():
    la = tagged_posterior()
    la.optimize_prior_precision()
    report = la.tuning.widest
    assert report is not None and report.nll <= report.nll_map + 0.0025 and report.tokens == 10
    narrow = la.covariance_scale
    la.optimize_prior_precision(method="marglik", correction=False)
    assert la.covariance_scale == 1 and narrow <= 1


def test_calibration_finds_the_best_width_and_temperature():
    la = tagged_posterior()
    before = label_nll(la)
    report = la.calibrate(tagged_loader(2, VALIDATION))
    assert report.nll_before == pytest.approx(float(before), rel=1e-5)
    assert report.nll_after == pytest.approx(float(label_nll(la)), rel=1e-5)
    assert report.nll_after < report.nll_before
    assert torch.equal(report.prior_precision, la.prior_precision)
    again = la.calibrate(tagged_loader(3, VALIDATION))  # from where it is now
    assert again.nll_before == pytest.approx(report.nll_after, rel=1e-5)


def test_calibration_in_parts_is_that_of_all_tokens(monkeypatch):
    def at_start(predictions, start, *others):
        return Found(start, *[predictions.losses(start).mean().item()] * 3)

    monkeypatch.setattr(calibration_search, "search", at_start)
    reports = []
    for room in (2**9, 2**22):
        monkeypatch.setattr(sampled_rows, "AT_ONCE", room)
        reports.append(tagged_posterior().calibrate(tagged_loader(2, VALIDATION)))
    assert reports[0].nll_after == pytest.approx(reports[1].nll_after, rel=1e-9)
    assert reports[0].ece_after == pytest.approx(reports[1].ece_after, rel=1e-6)


def test_evaluation_counts_the_labelled_tokens_and_resamples_texts():
    la = tagged_posterior()
    report = evaluate(la, tagged_loader(2, VALIDATION), ood_loader=tagged_loader())
    assert len(report.labels) == int((VALIDATION["labels"] != IGNORED).sum())
    assert report["NLL"] == pytest.approx(float(label_nll(la)), rel=1e-5)
    whole = evaluate(la.predict, tagged_loader(6, VALIDATION), ood_loader=tagged_loader())
    assert whole["accuracy"] == report["accuracy"] and report.errors.items() <= whole.errors.items()
    assert len(whole.ood_uncertainty) == 10  # of three texts, one token of each without a label
    assert whole["OOD AUROC (MI)"] > 0
    nothing = {**VALIDATION, "labels": torch.full_like(VALIDATION["labels"], IGNORED)}
    with pytest.raises(ValueError, match="all are -100"):
        evaluate(la, tagged_loader(2, nothing))
    single = {**VALIDATION, "labels": VALIDATION["labels"][:, 1]}
    with pytest.raises(ValueError, match=r"labels must be \(batch, tokens\)"):
        evaluate(la, tagged_loader(2, single))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="a token classifier has classes"):
        tagged_posterior(fit=False, target_ids=[3, 4])
    with pytest.raises(ValueError, match="takes the PeftModel"):
        tagged_posterior(fit=False, model=LogitsModel(tagger()))
    with pytest.raises(ValueError, match="predicts a vocabulary"):
        tagged_posterior(fit=False, model=peft_model("llama-lm"))
    with pytest.raises(ValueError, match="modules='classifier'"):
        tagged_posterior(DiagLoraLLLaplace, fit=False)
    with pytest.raises(ValueError, match="two classes or more"):
        tagged_posterior(fit=False, model=peft_model("bert", num_labels=1))
    with pytest.raises(ValueError, match="AutoModelForTokenClassification"):
        tagged_posterior(model=peft_model("bert"))
    la = tagged_posterior()
    data = tagged_loader(2, VALIDATION)
    for call in (
        lambda: la.optimize_prior_precision(method="gridsearch", val_loader=data),
        lambda: la.optimize_prior_precision("nn", "gridsearch", val_loader=data),
        lambda: la.optimize_prior_precision(method="val_gd", val_loader=data),
        lambda: la.optimize_prior_precision(method="loo"),
        lambda: la.recentre(precision=1.0),
        lambda: la.backend.jacobians(tagged_batch()),
    ):
        with pytest.raises(ValueError, match="outputs at every token"):
            call()
    with pytest.raises(ValueError, match="predictions by samples"):
        la.calibrate(data, link_approx="probit")
    with pytest.raises(ValueError, match="no token of the validation data"):
        nothing = torch.full_like(VALIDATION["labels"], IGNORED)
        la.calibrate(tagged_loader(2, {**VALIDATION, "labels": nothing}))


def test_bad_batches_are_refused_and_the_posterior_stays():
    la = tagged_posterior()
    before = la.log_marginal_likelihood()
    batch = tagged_batch()
    with pytest.raises(TypeError, match="collators"):
        la.fit(DataLoader([(row, row) for row in batch["input_ids"]], batch_size=2))
    for labels in (batch["labels"][:, :-1], batch["labels"].double(), batch["labels"][:, 0]):
        with pytest.raises(ValueError, match="one integer label per token"):
            la.fit(tagged_loader(2, {**batch, "labels": labels}))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        la.fit(tagged_loader(2, {**batch, "labels": batch["labels"] + 90}))
    assert torch.equal(la.log_marginal_likelihood(), before)


def test_labels_of_another_name_and_on_padding():
    """Labels at padding do not count, whatever they are."""
    batch = tagged_batch(pad_to=8)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, 1)
    other = {("tags" if key == "labels" else key): value for key, value in batch.items()}
    la = tagged_posterior(fit=False, dict_key_y="tags", **EXACT)
    la.fit(DataLoader([rows(other, n) for n in range(3)], batch_size=2))
    assert_near(la.log_marginal_likelihood(), tagged_posterior(**EXACT).log_marginal_likelihood())
    assert torch.equal(la.predict(other).labels[0, 4:], torch.full((4,), IGNORED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_that_are_learnt_to_the_last_bit_are_labels_all_the_same(dtype):
    """The loss is then zero, as it is where no token has a label."""
    model, batch = tagger("bert", dtype).eval(), tagged_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        head = model.base_model.model.classifier.modules_to_save.default
        head.weight.mul_(1000)
        head.bias.mul_(1000)
        known = batch["labels"] != IGNORED
        learnt = torch.where(known, model(**inputs).logits.argmax(-1), IGNORED)
    la = KronLoraLaplace(model, "token_classification")
    la.fit(tagged_loader(2, {**batch, "labels": learnt}))
    assert la.loss == 0 and la.n_data == 3
    nothing = torch.full_like(learnt, IGNORED)
    with pytest.raises(ValueError, match="no token of the training data has a label that counts"):
        la.fit(tagged_loader(2, {**batch, "labels": nothing}))
