"""Conformal prediction sets, and results by group."""

import math
import subprocess
import sys

import pytest
import torch

from laplace_lora.evaluation import compare, evaluate
from laplace_lora.evaluation.conformal import conformal_sets
from support.tokens import tagged_batch, tagged_posterior


def classified(n, seed, noise=1.0, classes=4):
    """Batches of probabilities, with labels drawn from other ones unless there is no noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    away = noise * torch.randn(n, classes, generator=generator)
    y = torch.multinomial((logits + away).softmax(1), 1, generator=generator).squeeze(1)
    return [{"p": logits.softmax(1), "labels": y}]


def given(batch):
    return batch["p"]


@pytest.mark.parametrize("coverage", [0.5, 0.7, 0.8, 0.95])
def test_sets_are_those_below_the_quantile(coverage):
    (test,), (apart,) = classified(50, 0), classified(59, 1)
    found = conformal_sets(test["p"], apart["p"], apart["labels"], coverage)
    scores = sorted(
        1 - float(p[y]) for p, y in zip(apart["p"].double(), apart["labels"], strict=True)
    )
    quantile = scores[math.ceil((len(scores) + 1) * coverage) - 1]
    assert torch.equal(found, 1 - test["p"].double() <= quantile)
    assert 0 < found.double().mean() < 1


@pytest.mark.slow
def test_warning_filters_stay_as_they_were():
    code = (
        "import warnings, torch\n"
        "from laplace_lora.evaluation.conformal import conformal_sets\n"
        "before = list(warnings.filters)\n"
        "p = torch.full((40, 2), 0.5)\n"
        "conformal_sets(p, p, torch.zeros(40, dtype=torch.long))\n"
        "assert warnings.filters == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_report_has_coverage_and_size():
    data, apart = classified(400, 2), classified(400, 3)
    report = evaluate(given, data, name="given", conformal_loader=apart)
    held = report.sets.gather(1, report.labels.unsqueeze(1)).double()
    assert report["coverage"] == pytest.approx(float(held.mean()))
    assert report["set size"] == pytest.approx(float(report.sets.sum(1).double().mean()))
    assert report.errors["coverage"] == pytest.approx(float(held.std()) / 20, rel=0.2)
    assert abs(report["coverage"] - 0.9) < 4 * report.errors["coverage"]
    assert "set size" in str(report) and "coverage" in str(report)
    plain = evaluate(given, data, name="given")
    assert plain.sets is None and "coverage" not in plain.values
    assert all(report[metric] == value for metric, value in plain.values.items())
    assert all(report.errors[metric] == error for metric, error in plain.errors.items())
    wide = evaluate(given, data, conformal_loader=apart, coverage=0.99)
    assert wide["set size"] > report["set size"] and wide["coverage"] > report["coverage"]


def test_sets_cover_whatever_the_predictive():
    """On average over calibrations, at least as often as asked, and less than 1/(n + 1) more."""
    found = []
    for seed in range(200):
        (rows,) = classified(59, seed, noise=3.0)
        p, y = rows["p"].pow(4), rows["labels"]  # far too sure
        p = p / p.sum(1, keepdim=True)
        sets = conformal_sets(p[39:], p[:39], y[:39], 0.8)
        found.append(float(sets.gather(1, y[39:].unsqueeze(1)).double().mean()))
    mean = sum(found) / len(found)
    error = torch.tensor(found).std().item() / len(found) ** 0.5
    assert 0.8 - 3 * error < mean < 0.8 + 1 / 40 + 3 * error
    assert error < 0.01


def test_tables_bold_the_smaller_sets_and_no_coverage():
    data, apart = classified(200, 4), classified(200, 5)
    flat = evaluate(lambda b: b["p"].sqrt() / b["p"].sqrt().sum(1, keepdim=True), data, name="flat")
    reports = [
        evaluate(given, data, name="given", conformal_loader=apart),
        evaluate(lambda b: b["p"].flip(1), data, name="flipped", conformal_loader=apart),
        flat,
    ]
    lines = [line.split("|") for line in compare(reports, ["set size", "coverage"]).splitlines()]
    assert "**" in lines[2][2] and "**" not in lines[3][2] and lines[4][2].strip() == "-"
    assert not any("**" in line[3] for line in lines)
    assert [cell.strip() for cell in lines[5][2:4]] == ["lower", "as asked"]


def test_conformal_refusals(monkeypatch):
    data, apart = classified(30, 6), classified(18, 7)
    for coverage in (0.0, 1.0, 90):
        with pytest.raises(ValueError, match="between 0 and 1"):
            evaluate(given, data, conformal_loader=apart, coverage=coverage)
    with pytest.raises(ValueError, match=r"0\.95 need 19 labelled examples or more.*got 18"):
        evaluate(given, data, conformal_loader=apart, coverage=0.95)
    evaluate(given, data, conformal_loader=classified(19, 7), coverage=0.95)
    with pytest.raises(ValueError, match="loader of conformal sets is empty"):
        evaluate(given, data, conformal_loader=[])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
        evaluate(given, data, conformal_loader=[{**apart[0], "labels": apart[0]["labels"] + 4}])
    many = [{"p": torch.rand(9, 3), "labels": torch.randint(2, (9, 3)).float()}]
    with pytest.raises(ValueError, match="one class per example"):
        evaluate(given, many, conformal_loader=many, coverage=0.5)
    la, tags = tagged_posterior(), [tagged_batch()]
    with pytest.raises(ValueError, match="one class per example"):
        evaluate(la, tags, conformal_loader=tags, coverage=0.5)
    monkeypatch.setitem(sys.modules, "crepes", None)
    with pytest.raises(ImportError, match="pip install crepes"):
        evaluate(given, data, conformal_loader=data)


@pytest.mark.slow
def test_every_group_has_a_report_of_its_own():
    (rows,) = classified(90, 8)
    apart = classified(100, 9)
    groups = ["long", "short", "short"] * 30
    report = evaluate(given, [rows], name="given", groups=groups, conformal_loader=apart)
    assert list(report.by_group) == ["long", "short"]
    for group, part in report.by_group.items():
        mask = torch.tensor([name == group for name in groups])
        own = [{key: value[mask] for key, value in rows.items()}]
        alone = evaluate(given, own, name=f"given, {group}", conformal_loader=apart)
        assert part.name == alone.name and part.values == alone.values
        assert part.errors == alone.errors and torch.equal(part.sets, alone.sets)
    total = sum(len(part.labels) * part["NLL"] for part in report.by_group.values())
    assert total / 90 == pytest.approx(report["NLL"], rel=1e-6)
    assert compare([report, *report.by_group.values()]).count("given") == 3
    assert report.to_dict()["by_group"]["long"]["examples"] == 30
    assert "by_group" not in evaluate(given, [rows]).to_dict()
    numbers = torch.tensor([0, 1, 1] * 30)
    other = evaluate(given, [rows], groups=numbers)
    assert other.by_group[1].values.items() <= report.by_group["short"].values.items()


def test_missing_groups_are_one_group():
    (rows,) = classified(90, 8)
    report = evaluate(given, [rows], groups=torch.tensor([0.0, math.nan, math.nan] * 30))
    assert [len(part.labels) for part in report.by_group.values()] == [30, 60]


def test_groups_of_texts_hold_all_their_tokens():
    la, batch = tagged_posterior(), tagged_batch()
    report = evaluate(la, [batch], groups=["a", "b", "a"])
    counts = (batch["labels"] != -100).sum(1).tolist()
    assert len(report.by_group["b"].labels) == counts[1]
    assert len(report.by_group["a"].labels) == counts[0] + counts[2]


@pytest.mark.parametrize("groups", [["a"] * 89, ["a"] * 91, []])
def test_another_number_of_groups_is_refused(groups):
    with pytest.raises(ValueError, match=f"each of 90 examples.*got {len(groups)}"):
        evaluate(given, classified(90, 8), groups=groups)
