"""Posteriors over independent labels: predictions, tuning, files, refusals."""

import math

import numpy as np
import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
)
from support.models import peft_model
from support.multilabel import (
    explicit_label_ggn,
    explicit_loss,
    known,
    multilabel_batch,
    multilabel_loader,
    multilabel_posterior,
)
from support.references import assert_near, looped_jacobians

BATCH = multilabel_batch()
NEW = multilabel_batch((4, 2, 6, 5), missing=False, seed=5)


@pytest.fixture(scope="module")
def full():
    la = multilabel_posterior(FullLoraLaplace)
    la.prior_precision = 0.5
    return la


def gaussian_moments(la, batch):
    """Mean and covariance of the logits from explicit Jacobians and a dense inverse."""
    model = la.logits_model.eval()
    precision = explicit_label_ggn(model, BATCH)
    precision.diagonal().add_(0.5)
    J = looped_jacobians(model, batch)
    return model(batch).detach(), torch.einsum("ncp,pq,ndq->ncd", J, precision.inverse(), J)


def sigmoid_integral(mean, variance):
    """E[σ(f)] by numpy's Gauss-Hermite nodes."""
    x, w = map(torch.from_numpy, np.polynomial.hermite.hermgauss(100))
    f = mean.unsqueeze(-1) + (2 * variance).sqrt().unsqueeze(-1) * x
    return (f.sigmoid() * w).sum(-1) / math.sqrt(math.pi)


def test_probabilities_are_the_scalar_integral_of_every_label(full):
    mean, covariance = gaussian_moments(full, NEW)
    variance = covariance.diagonal(dim1=1, dim2=2)
    found = full.predict(NEW)
    assert_near(found.mean, mean)
    assert_near(found.covariance, covariance)
    expected = sigmoid_integral(mean, variance)
    assert_near(found.probs, expected)
    assert_near(full(NEW), expected)
    assert_near(full(NEW, diagonal_output=True), expected)
    probit = (mean / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
    assert_near(full(NEW, link_approx="probit"), probit)
    drawn = full(NEW, link_approx="mc", n_samples=50_000)
    torch.testing.assert_close(drawn, expected, atol=5e-3, rtol=0)
    sampled = full(NEW, method="sampled", n_samples=1000)
    torch.testing.assert_close(sampled, expected, atol=2e-2, rtol=0)


def test_entropies_are_those_of_every_label(full):
    found = full.predict(NEW)
    assert found.entropy.shape == found.mutual_information.shape == (4, 3)
    p = found.probs
    total = torch.special.entr(p) + torch.special.entr(1 - p)
    torch.testing.assert_close(found.entropy, total, atol=1e-4, rtol=0)
    mean, covariance = gaussian_moments(full, NEW)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100_000, 1, 1, generator=generator, dtype=torch.float64)
    q = (mean + covariance.diagonal(dim1=1, dim2=2).sqrt() * noise).sigmoid()
    aleatoric = (torch.special.entr(q) + torch.special.entr(1 - q)).mean(0)
    torch.testing.assert_close(found.aleatoric, aleatoric, atol=5e-3, rtol=0)
    sampled = full.predict(NEW, method="sampled", n_samples=1000)
    torch.testing.assert_close(sampled.entropy, total, atol=2e-2, rtol=0)
    torch.testing.assert_close(sampled.aleatoric, aleatoric, atol=3e-2, rtol=0)


@pytest.mark.slow
def test_sampled_weights_give_the_mean_of_the_sigmoids():
    la = multilabel_posterior(FullLoraLLLaplace)
    la.prior_precision = 0.5
    found = la(NEW, pred_type="nn", link_approx="mc", n_samples=20_000)
    torch.testing.assert_close(found, la(NEW), atol=1e-2, rtol=0)
    samples = la.predictive_samples(NEW, pred_type="nn", n_samples=500)
    assert samples.shape == (500, 4, 3) and bool(((samples > 0) & (samples < 1)).all())


def test_predictive_samples_average_to_the_probabilities(full):
    generator = torch.Generator().manual_seed(0)
    samples = full.predictive_samples(NEW, n_samples=20_000, generator=generator)
    torch.testing.assert_close(samples.mean(0), full(NEW), atol=1e-2, rtol=0)


def test_many_labels_are_predicted_from_samples_by_default():
    la = multilabel_posterior(DiagLoraLaplace, num_labels=60)
    batch = multilabel_batch((3, 5), missing=False, outputs=60)
    assert torch.equal(la(batch), la(batch, method="sampled"))
    sampled = la(batch, method="sampled", n_samples=600)
    torch.testing.assert_close(sampled, la(batch, method="exact"), atol=4e-2, rtol=0)


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace])
def test_the_evidence_counts_the_known_labels(cls):
    la = multilabel_posterior(cls)
    loss = explicit_loss(la.logits_model.eval(), BATCH).detach()
    assert_near(torch.tensor(la.loss).double(), loss)
    expected = -loss - 0.5 * (la.log_det_ratio + la.scatter)
    assert_near(la.log_marginal_likelihood(), expected)


def test_the_default_tuning_is_leave_one_out_where_it_is_affordable():
    la = multilabel_posterior()
    la.optimize_prior_precision()
    assert la.tuning.method == "loo" and la.tuning.leave_one_out.examples == 7


@pytest.mark.parametrize("method", ["loo", "marglik", "gridsearch", "val_gd"])
def test_every_tuning_moves_the_prior(method):
    la = multilabel_posterior()
    before = float(la.prior_precision)
    data = {"val_loader": multilabel_loader(seed=7)} if method in ("gridsearch", "val_gd") else {}
    la.optimize_prior_precision(method=method, **data)
    assert float(la.prior_precision) != before and math.isfinite(float(la.prior_precision))


def test_a_grid_search_scores_the_known_labels():
    la = multilabel_posterior()
    val = multilabel_batch((4, 6, 2, 5), seed=7)
    loader = torch.utils.data.DataLoader([val], batch_size=None)
    options = {"log_prior_prec_min": -1, "log_prior_prec_max": 1, "grid_size": 3}
    la.optimize_prior_precision(method="gridsearch", val_loader=loader, **options)
    losses = {}
    for precision in (0.1, 1.0, 10.0):
        other = multilabel_posterior()
        other.prior_precision = precision
        losses[precision] = label_nll(other, val)
    assert float(la.prior_precision) == pytest.approx(min(losses, key=losses.get), rel=1e-6)


def label_nll(la, batch):
    """Mean over examples of the summed NLL of the known labels."""
    p, y, is_known = la(batch), batch["labels"], known(batch)
    losses = torch.where(y == 1, -p.log(), -(1 - p).log())
    return float(torch.where(is_known, losses, 0).sum(1).mean())


def test_calibration_improves_the_nll_that_it_reports():
    la = multilabel_posterior()
    val = multilabel_batch((4, 6, 2, 5, 3, 6, 1, 4), seed=7)
    loader = torch.utils.data.DataLoader([val], batch_size=None)
    before = label_nll(la, val)
    report = la.calibrate(loader)
    assert label_nll(la, val) < before
    assert report.nll_after == pytest.approx(label_nll(la, val), rel=1e-3)
    assert la.likelihood_temperature != 1


@pytest.mark.parametrize(
    "cls", [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace, KronLoraLLLaplace]
)
def test_a_saved_posterior_comes_back(cls, tmp_path):
    la = multilabel_posterior(cls)
    la.optimize_prior_precision(method="marglik")
    la.save_pretrained(tmp_path, precision="exact")
    back = cls.from_pretrained(la.logits_model.model, tmp_path)
    assert back.likelihood == "multilabel"
    assert torch.equal(back(NEW), la(NEW))
    other = cls(la.logits_model.model, "multilabel")
    other.load_state_dict(la.state_dict())
    assert torch.equal(other(NEW), la(NEW))


def test_what_people_read():
    la = multilabel_posterior()
    assert str(la).startswith("KronLoraLaplace: multilabel by BertForSequenceClassification, 3 out")
    found = la.predict(BATCH)
    assert repr(found).startswith("Predictions of 7 examples, 3 labels: mean entropy")
    columns = found.to_dict()
    assert columns["prediction"] == (found.probs > 0.5).long().tolist()
    assert columns["labels"][0][1] == -100 and columns["labels"][1] == [-100, -100, -100]
    frame = found.to_pandas()
    for name in ("label_1", "prediction_2", "prob_0", "entropy_0", "mutual_information_2"):
        assert len(frame[name]) == 7
    predicted = [[n for n, label in enumerate(row) if label] for row in columns["prediction"]]
    for labels in predicted:
        assert f"<td>{', '.join(map(str, labels))}</td>" in found._repr_html_()
    assert found[2:4].entropy.shape == (2, 3)


def test_predictions_are_those_of_single_examples():
    la = multilabel_posterior()
    together = la.predict(multilabel_loader())
    alone = la.predict(multilabel_loader(batch_size=1))
    for name in ("mean", "covariance", "probs", "entropy", "mutual_information"):
        assert_near(getattr(together, name), getattr(alone, name))
    assert torch.equal(together.labels, alone.labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((7, 3), 2), "must be 0, 1, or missing"),
        (torch.full((7, 3), 0.5), "must be 0, 1, or missing"),
        (torch.ones(7, 2), "one label per output"),
        (torch.ones(7), "one label per output"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message):
    la = multilabel_posterior(fit=False)
    loader = torch.utils.data.DataLoader([{**BATCH, "labels": labels}], batch_size=None)
    with pytest.raises(ValueError, match=message):
        la.fit(loader)


def test_what_knows_no_independent_labels_refuses_them_by_name():
    model = peft_model("bert")
    with pytest.raises(ValueError, match="the likelihood is 'multilabel'; use another class"):
        FunctionalLoraLLLaplace(model, "multilabel", 5)
    la = multilabel_posterior()
    options = {"pred_type": "nn", "method": "gridsearch", "val_loader": multilabel_loader()}
    with pytest.raises(ValueError, match="knows no independent labels"):
        la.optimize_prior_precision(**options)
    with pytest.raises(ValueError, match="needs two logits"):
        la(NEW, link_approx="bridge")


def test_classes_are_refused_where_the_configuration_says_labels():
    model = peft_model("bert")
    model.get_base_model().config.problem_type = "multi_label_classification"
    for cls in (KronLoraLaplace, KronLoraLLLaplace):
        with pytest.raises(ValueError, match="likelihood='multilabel'"):
            cls(model, "classification")
    with pytest.raises(ValueError, match="likelihood='multilabel'"):
        FunctionalLoraLLLaplace(model, "classification", 5)
    KronLoraLaplace(model, "multilabel")
    read = LogitsModel(model, output=lambda out: out.logits[:, :2])
    KronLoraLaplace(read, "classification")
