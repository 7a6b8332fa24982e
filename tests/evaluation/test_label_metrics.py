"""Metrics, reports and baselines of independent labels."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import (
    MAP,
    MCDropout,
    TemperatureScaling,
    compare,
    diagonal_laplace,
    evaluate,
    last_layer_laplace,
    plot_reports,
)
from laplace_lora.evaluation.label_metrics import (
    average_precisions,
    calibration_errors,
    label_ece,
    label_entropy,
    mean_average_precision,
)
from laplace_lora.evaluation.training_free import TrainingFreeBayes
from laplace_lora.likelihoods.multilabel import pooled
from support.batches import LENGTHS, token_batch
from support.models import peft_model
from support.multilabel import multilabel_batch, multilabel_loader, multilabel_posterior

torch.manual_seed(0)
P = torch.rand(40, 3, dtype=torch.float64)
Y = torch.randint(2, (40, 3)).double()
Y[::7, 0], Y[3, 1:] = torch.nan, -100.0
IS_KNOWN = ~(Y.isnan() | (Y == -100))


def given(batch):
    return batch["p"]


def batches(p=P, y=Y, size=9):
    return [{"p": a, "labels": b} for a, b in zip(p.split(size), y.split(size), strict=True)]


def labelled_model(**kwargs):
    model = peft_model("bert", **kwargs)
    model.get_base_model().config.problem_type = "multi_label_classification"
    return model


def test_average_precision_is_scikit_learns_over_the_known_labels():
    expected = [
        average_precision_score(Y[IS_KNOWN[:, k], k].numpy(), P[IS_KNOWN[:, k], k].numpy())
        for k in range(3)
    ]
    assert average_precisions(P, Y).tolist() == pytest.approx(expected, abs=1e-6)
    assert mean_average_precision(P, Y) == pytest.approx(np.mean(expected), abs=1e-6)
    never = torch.cat([Y, torch.zeros(40, 1)], dim=1)
    wide = torch.cat([P, P[:, :1]], dim=1)
    assert math.isnan(average_precisions(wide, never)[3])
    assert mean_average_precision(wide, never) == pytest.approx(np.mean(expected), abs=1e-6)


def test_calibration_errors_are_those_of_a_loop_over_bins():
    expected = []
    for k in range(3):
        p, y = P[IS_KNOWN[:, k], k], Y[IS_KNOWN[:, k], k]
        bins = (p * 15).long()
        gaps = [abs(float((p - y)[bins == b].sum())) for b in range(15)]
        expected.append(sum(gaps) / len(p))
    assert calibration_errors(P, Y).tolist() == pytest.approx(expected, abs=1e-6)
    assert label_ece(P, Y) == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_probability_that_rounding_took_beyond_one_changes_nothing():
    """Not the calibration error, and not which of many near-certain labels come first."""
    p, y = torch.rand(40, 2), torch.randint(2, (40, 2))
    p[:20] *= 1e-7  # no sigmoid tells them apart
    p[3], y[3] = 1.0, 1
    above = p.clone()
    above[3] = 1.0000001
    assert calibration_errors(above, y).tolist() == calibration_errors(p, y).tolist()
    assert average_precisions(above, y).tolist() == average_precisions(p, y).tolist()
    assert evaluate(given, batches(above, y), bootstrap=2).values == (
        evaluate(given, batches(p, y), bootstrap=2).values
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8, torch.bool])
def test_labels_of_a_single_sigmoid_need_no_second_dimension(dtype):
    p, y = torch.rand(20, 1), torch.randint(2, (20,)).to(dtype)
    one, two = (evaluate(given, batches(p, some), bootstrap=5) for some in (y, y.unsqueeze(1)))
    assert one.values == two.values and one.errors == two.errors
    right = float(((p[:, 0] > 0.5) == y.bool()).double().mean())
    assert one["accuracy"] == pytest.approx(right)
    away = evaluate(given, batches(p, y), ood_loader=batches(p, y), bootstrap=2)
    assert away["OOD AUROC"] == 0.5


def test_a_posterior_and_a_baseline_of_a_single_sigmoid_are_scored_as_they_were_fitted():
    model, batch = labelled_model(num_labels=1), token_batch(LENGTHS)
    y = torch.arange(len(batch["labels"])) % 2
    flat, tall = ([{**batch, "labels": labels}] for labels in (y, y.unsqueeze(1)))
    la = KronLoraLaplace(model, "multilabel")
    la.fit(torch.utils.data.DataLoader(flat, batch_size=None))
    for predict in (la, la.predict, MAP(model)):
        report = evaluate(predict, flat, bootstrap=2)
        assert report.values == evaluate(predict, tall, bootstrap=2).values
        assert report.labels.shape == (len(y), 1)
    assert (
        TemperatureScaling(model, flat).temperature == TemperatureScaling(model, tall).temperature
    )


def test_a_model_of_classes_with_one_output_is_refused():
    """Its softmax is 1 whatever it says."""
    batch = {**token_batch(LENGTHS), "labels": torch.arange(len(LENGTHS)) % 2}
    with pytest.raises(ValueError, match=r"a single output, which is no class.*of a regression"):
        evaluate(MAP(peft_model("bert", num_labels=1)), [batch])


def test_a_label_each_of_several_is_refused():
    model, batch = labelled_model(), token_batch(LENGTHS)
    with pytest.raises(ValueError, match="need a probability each"):
        evaluate(MAP(model), [{**batch, "labels": batch["labels"] % 2}])


def test_opposite_errors_of_two_labels_do_not_cancel():
    p = torch.full((100, 2), 0.5)
    y = torch.tensor([[0, 1]]).repeat(100, 1)
    assert label_ece(p, y) == pytest.approx(0.5)
    assert evaluate(given, batches(p, y), bootstrap=2)["ECE"] == pytest.approx(0)


def test_a_report_scores_the_known_labels_and_no_others():
    report = evaluate(given, batches(), name="given", bootstrap=20)
    p, y = P[IS_KNOWN], Y[IS_KNOWN]
    assert report["NLL"] == pytest.approx(float(-torch.where(y == 1, p, 1 - p).log().mean()), 1e-5)
    assert report["accuracy"] == pytest.approx(float(((p > 0.5) == y).double().mean()), rel=1e-5)
    assert report["Brier"] == pytest.approx(float(2 * (p - y).square().mean()), rel=1e-5)
    assert report["mAP"] == pytest.approx(mean_average_precision(P, Y), abs=1e-5)
    assert set(report.values) == set(report.errors)
    assert report.labels.shape == (40, 3) and report.labels[3].tolist()[1:] == [-100, -100]
    assert str(report).startswith("given: mAP ")
    changed = torch.where(IS_KNOWN, P, 0.123)
    assert evaluate(given, batches(changed), bootstrap=2)["AURC"] == pytest.approx(report["AURC"])
    assert report.by_label["known"] == IS_KNOWN.sum(0).tolist()
    assert report.by_label["apply"] == (Y == 1).sum(0).tolist()
    assert report.by_label["ECE"] == pytest.approx(calibration_errors(P, Y).tolist(), abs=1e-5)
    assert "| mAP" in compare([report]) and plot_reports([report]) is not None
    torch.testing.assert_close(report.uncertainty, label_entropy(P.float()))
    binary = -(P * P.log() + (1 - P) * (1 - P).log()).sum(1)
    torch.testing.assert_close(label_entropy(P), binary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probability_that_rounds_to_one_costs_no_more_than_its_dtype_knows(dtype):
    logits, y = (
        torch.tensor([[25.0, -3.0], [-2.0, 4.0]], dtype=dtype),
        torch.tensor([[0, 0], [0, 1]]),
    )
    exact = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), y.double())
    found = evaluate(given, [{"p": logits.sigmoid(), "labels": y}], bootstrap=2)["NLL"]
    if dtype == torch.float64:
        assert found == pytest.approx(float(exact), rel=1e-4)
    else:  # 1 - 3e-8 and more are 1 in float32
        assert found == pytest.approx(float(exact) - (25 - 25 * math.log(2)) / 4, rel=1e-4)


def test_a_bootstrap_resamples_examples_not_labels():
    """Three labels that always agree carry no more than one."""
    p, y = torch.full((300, 1), 0.5), (torch.rand(300, 1) < 0.5).long()
    p[y == 1] += 0.2  # predicted 1 where it applies, 0 or 1 elsewhere
    one = evaluate(given, batches(p, y), bootstrap=100)
    three = evaluate(given, batches(p.expand(-1, 3), y.expand(-1, 3)), bootstrap=100)
    for metric in ("NLL", "Brier"):
        assert three.errors[metric] == pytest.approx(one.errors[metric], rel=1e-5)


def test_few_known_labels_leave_resamples_without_any():
    y = torch.full_like(Y, -100)
    y[:3] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0]])
    report = evaluate(given, batches(y=y), groups=["known"] * 3 + ["none"] * 37)
    known = report.by_group["known"]
    for metric in ("accuracy", "NLL", "AURC", "mAP"):
        assert known[metric] == pytest.approx(report[metric])
        assert known.errors[metric] > 0 and report.errors[metric] > 0
    none = report.by_group["none"]
    assert all(math.isnan(none[m]) and math.isnan(none.errors[m]) for m in none.values)
    for order in ([none, known], [known, none]):
        table = compare(order, ["NLL"])
        assert "**nan**" not in table and f"**{known['NLL']:.3f}**" in table


def test_out_of_distribution_labels_are_separated_by_their_summed_entropy():
    outside = [{"p": torch.full((4, 3), 0.5)}]
    report = evaluate(given, batches(), ood_loader=outside, bootstrap=2)
    assert report["OOD AUROC"] == 1 and len(report.ood_uncertainty) == 4
    la = multilabel_posterior()
    report = evaluate(la.predict, multilabel_loader(), ood_loader=multilabel_loader(), bootstrap=2)
    assert report["OOD AUROC (MI)"] == 0.5 and report.mutual_information.shape == (7, 3)


def test_what_are_no_labels_or_probabilities_of_labels_is_refused():
    with pytest.raises(ValueError, match="apply a sigmoid"):
        evaluate(given, batches(P + 1))
    with pytest.raises(ValueError, match=r"not numbers \(NaN\); look for"):
        evaluate(given, batches(P * torch.nan))
    with pytest.raises(ValueError, match="need a probability each"):
        evaluate(given, batches(P[:, :2]))
    with pytest.raises(ValueError, match="must be 0, 1, or missing"):
        evaluate(given, batches(y=Y + 1))
    with pytest.raises(ValueError, match="no label of the data is known"):
        evaluate(given, batches(y=torch.full_like(Y, -100)))
    classes = evaluate(given, [{"p": torch.tensor([[0.4, 0.6]]), "labels": torch.tensor([1])}])
    with pytest.raises(ValueError, match="exclude each other"):
        classes.by_label  # noqa: B018


@pytest.mark.slow
def test_baselines_take_the_sigmoid_where_the_configuration_says_so():
    model, batch = labelled_model(), multilabel_batch()
    own = MAP(model)
    expected = own.logits(batch).sigmoid()
    assert torch.equal(own(batch), expected)
    logits = own.logits(batch)
    y = (logits > 0).double()
    y[5] = 1 - y[5]  # errors, so that there is a best temperature
    batch["labels"] = torch.where(batch["labels"].isnan(), torch.nan, y)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    scaled = TemperatureScaling(model, loader)
    assert torch.equal(scaled(batch), (own.logits(batch) / scaled.temperature).sigmoid())

    def mean_nll(temperature):
        p = (own.logits(batch) / temperature).sigmoid()
        (rows, y) = pooled(p, batch["labels"])
        return float(-rows[range(len(y)), y].log().mean())

    best = min(np.geomspace(0.01, 100, 400), key=mean_nll)
    assert 0.02 < best < 50
    assert math.log(scaled.temperature) == pytest.approx(math.log(best), abs=0.03)
    dropout = MCDropout(model, n_samples=3)(batch)
    assert dropout.shape == (7, 3) and not torch.allclose(dropout.sum(1), torch.ones(7).double())
    loader = multilabel_loader()
    for fitted in (last_layer_laplace(model, loader), diagonal_laplace(model, loader)):
        assert fitted.likelihood == "multilabel"
    with pytest.raises(ValueError, match="independent labels have none"):
        TrainingFreeBayes(model, loader)


def test_baselines_take_the_sigmoid_where_they_are_told_to():
    """As a posterior with the likelihood does, of a model whose configuration says nothing."""
    model, batch = peft_model("bert"), multilabel_batch()
    own = MAP(model, likelihood="multilabel")
    assert torch.equal(own(batch), own.logits(batch).sigmoid())
    report = evaluate(own, multilabel_loader(), bootstrap=2)
    assert report.labels.shape == (7, 3)
    assert TemperatureScaling(model, [batch], likelihood="multilabel").temperature > 0
    fitted = diagonal_laplace(model, multilabel_loader(), likelihood="multilabel")
    assert fitted.likelihood == "multilabel"
    with pytest.raises(ValueError, match=r"likelihood must be one of.*la.predict"):
        MAP(model, likelihood="regression")
    with pytest.raises(ValueError, match="do not exclude each other"):  # a softmax scored as labels
        evaluate(MAP(model), multilabel_loader())
