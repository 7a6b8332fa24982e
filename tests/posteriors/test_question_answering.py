"""Posteriors of question-answering models: tuning, calibration, files, refusals."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from laplace_lora import (
    DiagLoraLLLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LaplaceCallback,
    LogitsModel,
)
from laplace_lora.evaluation import evaluate
from laplace_lora.evaluation.spans import span_metrics
from laplace_lora.models.span_model import SpanModel
from support.batches import rows
from support.models import peft_model
from support.references import assert_near
from support.spans import EXACT, question_batch, question_loader, reader, span_posterior
from support.trainers import quiet

VALIDATION = question_batch((5, 4, 6, 3, 5, 6), (1, 2, 0, 1, 3, 2), (2, 3, 0, 1, 4, 5), seed=7)


def answer_nll(la, batch=VALIDATION):
    return float(-la.predict(batch).label_prob.log().mean())


def test_it_fits_tunes_and_comes_back_from_a_file(tmp_path):
    la = span_posterior()
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(method="marglik", correction=False)
    assert la.log_marginal_likelihood() >= before
    with pytest.warns(UserWarning, match="no maximum where it is credible"):
        la.optimize_prior_precision(method="marglik")
    assert la.log_marginal_likelihood(correction=True).isfinite()
    la.optimize_prior_precision()
    assert la.tuning.widest.nll <= la.tuning.widest.nll_map + 0.0025
    assert "question_answering by BertForQuestionAnswering\n" in str(la)
    la.calibrate(question_loader(3, VALIDATION))
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.model.model, tmp_path)
    assert isinstance(again.model, SpanModel)
    assert_near(again.predict(VALIDATION).prob, la.predict(VALIDATION).prob, 1e-12)
    short, long = (la.estimate_memory(question_batch(pad_to=width)) for width in (7, 14))
    assert short.jacobian == long.jacobian < 2**20 and short.activations < long.activations


def test_two_fits_add_up_whatever_the_lengths():
    whole = span_posterior(**EXACT)
    parts = span_posterior(fit=False, **EXACT)
    for n, width in enumerate((7, 8, 9)):
        batch = question_batch(pad_to=width)
        parts.fit(DataLoader([rows(batch, n)], batch_size=1), override=n == 0)
    assert_near(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert span_posterior(FullLoraLaplace, **EXACT).predict(VALIDATION).entropy.isfinite().all()


def test_calibration_finds_the_best_width_and_temperature():
    la = span_posterior()
    before = answer_nll(la)
    report = la.calibrate(question_loader(2, VALIDATION))
    assert report.nll_before == pytest.approx(before, rel=1e-5)
    assert report.nll_after == pytest.approx(answer_nll(la), rel=1e-5)
    assert report.nll_after < report.nll_before
    cut = [  # batches of other widths
        {k: v[:, :width] if v.ndim == 2 else v for k, v in rows(VALIDATION, slice(a, b)).items()}
        for a, b, width in ((0, 2, 5), (2, 6, 6))
    ]
    assert la.calibrate(cut).nll_before == pytest.approx(report.nll_after, rel=1e-5)


def test_labels_may_be_pairs_under_one_name():
    batch = question_batch()
    spans = torch.stack([batch.pop("start_positions"), batch.pop("end_positions")], dim=-1)
    la = span_posterior(fit=False, **EXACT)
    la.fit(DataLoader([{**rows(batch, n), "labels": spans[n]} for n in range(3)], batch_size=2))
    assert_near(la.log_marginal_likelihood(), span_posterior(**EXACT).log_marginal_likelihood())


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="parts of a text"):
        span_posterior(fit=False, target_ids=[3, 4])
    with pytest.raises(ValueError, match="takes the PeftModel"):
        span_posterior(fit=False, model=LogitsModel(reader()))
    with pytest.raises(ValueError, match="'qa_outputs'"):
        span_posterior(DiagLoraLLLaplace, fit=False)
    with pytest.raises(ValueError, match="AutoModelForQuestionAnswering"):
        span_posterior(model=peft_model("bert"))
    la = span_posterior()
    data = question_loader(2, VALIDATION)
    for call in (
        lambda: la.optimize_prior_precision(method="gridsearch", val_loader=data),
        lambda: la.optimize_prior_precision("nn", "gridsearch", val_loader=data),
        lambda: la.optimize_prior_precision(method="val_gd", val_loader=data),
        lambda: la.optimize_prior_precision(method="loo"),
        lambda: la.recentre(precision=1.0),
        lambda: la.backend.jacobians(question_batch()),
    ):
        with pytest.raises(ValueError, match="too many for Jacobians"):
            call()
    with pytest.raises(ValueError, match="predictions by samples"):
        la.calibrate(data, link_approx="probit")
    for predict in (la, la.predict):
        with pytest.raises(ValueError, match=r"answers in a text are scored by .*span_metrics"):
            evaluate(predict, data)


def test_bad_batches_are_refused_and_the_posterior_stays():
    la = span_posterior()
    before = la.log_marginal_likelihood()
    batch = question_batch()
    for starts, ends in (((1, 2, 0), (0, 2, 0)), ((9, 2, 0), (9, 2, 0)), ((-1, 2, 0), (3, 2, 0))):
        bad = {
            **batch,
            "start_positions": torch.tensor(starts),
            "end_positions": torch.tensor(ends),
        }
        with pytest.raises(ValueError, match="the answer of row 0"):
            la.fit(question_loader(3, bad))
    on_padding = {**batch, "end_positions": torch.tensor((6, 2, 0))}
    with pytest.raises(ValueError, match="the answer of row 0"):
        la.fit(question_loader(3, on_padding))
    with pytest.raises(ValueError, match=r"integers of shape \(2, 2\)"):
        la.fit(question_loader(2, {**batch, "start_positions": torch.rand(3)}))
    with pytest.raises(ValueError, match="neither 'start_positions'"):
        la.fit(question_loader(2, {k: batch[k] for k in ("input_ids", "attention_mask")}))
    with pytest.raises(TypeError, match="collators"):
        la.fit(DataLoader([(row, row[:2]) for row in batch["input_ids"]], batch_size=2))
    assert torch.equal(la.log_marginal_likelihood(), before)


def test_the_trainer_recognises_and_scores_it(tmp_path):
    train = [rows(question_batch((5, 6, 6, 5), (1, 2, 0, 1), (3, 2, 0, 1)), n) for n in range(4)]
    validation = [rows(VALIDATION, n) for n in range(6)]
    arguments = quiet(
        tmp_path,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=6,
        max_steps=2,
    )
    trainer = Trainer(
        reader(dtype=torch.float32), arguments, train_dataset=train, eval_dataset=validation
    )
    callback = LaplaceCallback(trainer, strict=True)
    assert callback.likelihood == "question_answering"
    trainer.add_callback(callback)
    trainer.train()
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    expected = span_metrics(callback.predict(validation))
    assert logged["eval_laplace_nll"] == pytest.approx(expected["NLL"], rel=1e-5)
    assert logged["eval_map_nll"] != logged["eval_laplace_nll"]
