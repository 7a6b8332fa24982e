"""Reports, tables and plots."""

import math

import pytest
import torch

from laplace_lora.evaluation import MAP, compare, evaluate, plot_reports
from laplace_lora.evaluation.metrics import nll
from laplace_lora.evaluation.risk_control import ANSWERED, ERROR_RATE
from laplace_lora.evaluation.scores import values_and_errors
from laplace_lora.predictive.predictions import Predictions
from support.preferences import pair_loader, reward_posterior

P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.55, 0.45]])
Y = torch.tensor([0, 1, 1, 1, 0])  # the second is wrong


def batches(p=P, y=Y, size=2):
    return [{"p": a, "labels": b} for a, b in zip(p.split(size), y.split(size), strict=True)]


def given(batch):
    return batch["p"]


def test_a_report_holds_every_metric_with_its_error():
    report = evaluate(given, batches(), name="given")
    assert report["accuracy"] == pytest.approx(0.8) and report["NLL"] == pytest.approx(nll(P, Y))
    assert set(report.values) == set(report.errors)
    assert all(0 <= error < 1 for error in report.errors.values())
    assert torch.equal(report.probs, P) and torch.equal(report.labels, Y)
    assert "given: accuracy 0.800 ± " in str(report)
    pairs = [(batch, batch["labels"]) for batch in batches()]
    assert evaluate(given, pairs).values == report.values


def test_an_average_that_rounding_took_beyond_one_scores_like_the_others():
    p = torch.tensor([[1.0, 0.0]] * 3 + [[0.7, 0.3]] * 5)
    y = torch.tensor([0, 0, 1, 0, 0, 0, 1, 1])
    ten = sum(0.1 * p for _ in range(10))
    assert ten.max() > 1
    report, expected = (evaluate(given, batches(some, y), bootstrap=2) for some in (ten, p))
    assert report.values == pytest.approx(expected.values, abs=1e-6)
    assert report.probs.max() == 1
    report = evaluate(given, batches(p + torch.tensor([1e-9, -1e-9]), y), bootstrap=2)
    assert report.values == pytest.approx(expected.values, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.bool])
def test_labels_may_be_integers_of_any_size(dtype):
    kwargs = {"conformal_loader": batches(P.repeat(4, 1), Y.repeat(4).to(dtype)), "bootstrap": 2}
    report = evaluate(given, batches(y=Y.to(dtype)), **kwargs)
    expected = evaluate(given, batches(), **kwargs)
    assert report.values == expected.values and report.labels.dtype == torch.int64


@pytest.mark.slow
def test_of_preference_pairs_the_chosen_text_wins():
    la, loader = reward_posterior(), pair_loader()
    labelled = [{**batch, "labels": torch.ones(len(batch["input_ids_chosen"]))} for batch in loader]
    p = la.predict(loader, progress_bar=False).probs
    for predict in (la, la.predict, MAP(la.logits_model)):
        report = evaluate(predict, loader)
        assert report.values == evaluate(predict, labelled).values
        assert set(report.labels.tolist()) == {1} and report.probs.shape == (5, 2)
        if predict == la.predict:
            assert report["NLL"] == pytest.approx(float(-p[:, 1].log().mean()))
            assert report["accuracy"] == pytest.approx(float((p[:, 1] > 0.5).float().mean()))
    with pytest.raises(ValueError, match="labels of 2 pairs must be 2 values"):
        evaluate(la, [{**batch, "labels": torch.full((2,), 2)} for batch in loader])


@pytest.mark.slow
def test_bootstrap_errors_are_those_of_a_mean():
    torch.manual_seed(0)
    y = torch.randint(2, (400,))
    p = torch.tensor([[0.7, 0.3]]).repeat(400, 1)
    report = evaluate(given, batches(p, y, 50), bootstrap=1000)
    share = report["accuracy"]
    assert report.errors["accuracy"] == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=0.1)
    assert evaluate(given, batches(p, y, 50), seed=1).errors != report.errors


def test_a_single_example_has_no_standard_error():
    one = evaluate(given, batches(P[1:2], Y[1:2]), name="one")
    assert one["accuracy"] == 0 and all(map(math.isnan, one.errors.values()))
    assert "accuracy 0.000, NLL 1.609" in str(one) and "±" not in str(one)
    line = " ".join(compare([one, evaluate(given, batches())]).splitlines()[2].split())
    assert line.startswith("| one | 0.000 | 1.609 |") and "±" not in line
    groups = evaluate(given, batches(), groups=list("abbbb")).by_group
    assert math.isnan(groups["a"].errors["NLL"]) and groups["b"].errors["NLL"] > 0


def test_what_one_example_alone_contributes_to_has_no_standard_error():
    away = evaluate(given, batches(), ood_loader=[{"p": P[:1]}])
    assert math.isnan(away.errors["OOD AUROC"]) and away.errors["NLL"] > 0
    known = torch.full((5, 2), torch.nan)
    known[2] = torch.tensor([0.0, 1.0])
    assert math.isnan(evaluate(given, batches(y=known)).errors["NLL"])
    text = [{"p": P.unsqueeze(0), "labels": Y.unsqueeze(0)}]  # tokens of one text
    assert math.isnan(evaluate(given, text).errors["NLL"])
    assert evaluate(given, text * 2).errors["NLL"] < 1e-6  # which do agree
    rows = {"p": P, "labels": Y, ANSWERED: P[:, 0] > 0.85}
    errors = values_and_errors(rows, None, 50, 0)[1]
    assert math.isnan(errors[ERROR_RATE]) and errors[ANSWERED] > 0


def test_out_of_distribution_data_are_evaluated_by_entropy_and_mutual_information():
    outside = [{"p": torch.tensor([[0.5, 0.5], [0.5, 0.5]])}]
    report = evaluate(given, batches(), ood_loader=outside)
    assert report["OOD AUROC"] == 1 and report["OOD FPR95"] == 0
    assert "OOD AUROC (MI)" not in report.values and len(report.ood_uncertainty) == 2

    def telling(batch):
        n = len(batch["p"])
        return Predictions(
            torch.zeros(n, 2), torch.zeros(n, 2, 2), batch["p"], None, batch["p"][:, 0]
        )

    report = evaluate(telling, batches(), ood_loader=outside)
    inside = torch.tensor([0.9, 0.8, 0.3, 0.4, 0.55])
    assert report["OOD AUROC (MI)"] == pytest.approx(float((inside < 0.5).double().mean()))
    assert torch.equal(report.mutual_information, P[:, 0])


def test_probabilities_in_float64_keep_what_float32_would_round_away():
    logits = torch.tensor([[0.0, 20.0 + i] for i in range(6)] + [[0.0, 120.0]]).double()
    y = torch.tensor([0, 0, 0, 1, 1, 1, 0])
    batch = {"p": logits.softmax(1), "labels": y}
    report = evaluate(given, [batch], bootstrap=2)
    exact = torch.nn.functional.cross_entropy(logits, y)
    assert report["NLL"] == pytest.approx(float(exact), rel=1e-6)
    wrong = (1 - y[[6, 5, 4, 3, 2, 1, 0]]).double().cumsum(0)  # the most confident first
    assert report["AURC"] == pytest.approx(float((wrong / torch.arange(1, 8)).mean()))


def test_a_name_stays_in_its_cell():
    table = compare([evaluate(given, batches(), name="Laplace, a|b\nc")], ["NLL"])
    assert len(table.splitlines()) == 4 and r"| Laplace, a\|b c |" in table


def test_tables_name_the_best():
    good = evaluate(given, batches(), name="good")
    bad = evaluate(lambda batch: batch["p"].flip(-1), batches(), name="bad")
    lines = compare([good, bad]).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned, as a terminal shows it
    table = [" ".join(line.split()) for line in lines]
    assert table[0].startswith("| method | accuracy | NLL")
    assert "| good | **0.800** ±" in table[2] and "| bad | 0.200 ±" in table[3]
    assert table[-1].startswith("| *better is* | higher | lower")
    assert compare([good, bad], ["Brier"]).count("**") == 2
    with pytest.raises(ValueError, match="no report has the metric 'F1'"):
        compare([good], ["F1"])
    with pytest.raises(ValueError, match="no reports"):
        compare([])


@pytest.mark.parametrize(
    "predict,loader,kwargs,message",
    [
        (given, [], {}, "the loader is empty"),
        (given, [{"p": P}], {}, "no 'labels'"),
        (given, batches(y=Y / 2), {}, "must be integers, got torch.float32"),
        (given, batches(y=Y + 1), {}, r"labels must lie in 0\.\.1"),
        (lambda batch: batch["p"].log(), batches(), {}, "apply a softmax"),
        (lambda batch: batch["p"] * math.nan, batches(), {}, r"not numbers \(NaN\); look for"),
        (lambda batch: batch["p"] + torch.tensor([1.0, -1.0]), batches(), {}, "apply a softmax"),
        (lambda batch: batch["p"][:, 0], batches(), {}, "class probabilities"),
        (lambda b: (b["p"], b["p"]), batches(), {}, "for classifiers: of a regression la.predict"),
        (lambda batch: batch["p"][:-1], batches(), {}, r"probabilities \(\d, 2\) for labels"),
        (given, batches(), {"bootstrap": 1}, "two resamples"),
        (given, batches(), {"ood_loader": []}, "out-of-distribution loader is empty"),
    ],
)
def test_bad_input_is_refused(predict, loader, kwargs, message):
    with pytest.raises(ValueError, match=message):
        evaluate(predict, loader, **kwargs)


def test_a_single_batch_is_no_loader():
    batch = batches()[0]
    with pytest.raises(TypeError, match=r"got a single one; put it in a list: \[batch\]"):
        evaluate(given, batch)
    with pytest.raises(TypeError, match="got a single one"):
        evaluate(given, [batch], ood_loader=batch)


def test_every_label_has_a_prediction():
    """Of tokens, more labels than predictions were cut to these without a word."""
    p = torch.full((2, 3, 2), 0.5)
    with pytest.raises(ValueError, match=r"\(2, 3, 2\) for labels \(2, 4\)"):
        evaluate(given, [{"p": p, "labels": torch.zeros(2, 4).long()}])


def test_pictures_have_labels_counts_and_a_row_a_report(tmp_path):
    report = evaluate(given, batches(), name="given")
    figure = report.plot()
    left, middle, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("confidence", "accuracy")
    assert (middle.get_xlabel(), middle.get_ylabel()) == ("confidence", "examples")
    assert right.get_xlabel() == "coverage" and "error rate" in right.get_ylabel()
    assert sorted(text.get_text() for text in left.texts) == ["1"] * 5
    assert "ECE 0.410" in left.get_title()
    tallest = max(bar.get_height() for bar in middle.patches)
    assert middle.get_ylim()[1] > 1.3 * tallest  # the legend covers no bar
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert len(plot_reports([report, report]).axes) == 6
    with pytest.raises(ValueError, match="no reports"):
        plot_reports([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_picture_has_the_bins_of_the_reported_error(dtype):
    """Confidences on the edges, as of votes, are where torchmetrics counts them."""
    edges = torch.tensor([k / 15 for k in range(8, 16)], dtype=dtype).repeat_interleave(3)
    confidence = torch.cat([edges, torch.tensor([0.7, 0.61, 0.82], dtype=dtype)])
    p = torch.stack([confidence, 1 - confidence], 1)
    y = torch.arange(len(p)) % 2
    report = evaluate(given, [{"p": p, "labels": y}], bootstrap=2)
    reliability, histogram, _ = report.plot().axes
    counts = [int(text.get_text()) for text in reliability.texts]
    gaps = [bar.get_height() for bar in reliability.patches[len(counts) :]]
    drawn = sum(n * abs(gap) for n, gap in zip(counts, gaps, strict=True)) / len(p)
    assert drawn == pytest.approx(report["ECE"], abs=1e-7)
    assert [bar.get_height() for bar in histogram.patches if bar.get_height()] == counts


def test_every_row_of_a_picture_is_drawn_whole():
    """Whatever row comes first sets no limits for the others, and names may be long."""
    good = evaluate(given, batches(), name="good")
    bad = evaluate(given, batches(y=1 - Y), name="a method of whose errors there are many")
    figure = plot_reports([good, bad])
    figure.draw_without_rendering()
    for axis in figure.axes[2::3]:
        lowest, highest = axis.get_ylim()
        assert lowest == 0
        assert all(max(line.get_ydata()) <= highest for line in axis.lines)
    width = figure.get_window_extent().width
    assert all(a.title.get_window_extent().x0 >= 0 for a in figure.axes)
    assert all(a.title.get_window_extent().x1 <= width for a in figure.axes)


def test_the_bars_of_an_overconfident_method_are_drawn_whole_above_a_calibrated_one():
    sure, spread = torch.full((30,), 0.97), torch.linspace(0.51, 0.99, 30)
    reports = [
        evaluate(given, [{"p": torch.stack([p, 1 - p], 1), "labels": torch.arange(30) % 2}])
        for p in (sure, spread)
    ]
    for order in (reports, reports[::-1]):
        for histogram in plot_reports(order).axes[1::3]:
            tallest = max(bar.get_height() for bar in histogram.patches)
            assert histogram.get_ylim()[1] > 1.3 * tallest
