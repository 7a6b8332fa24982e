"""From which confidence on to answer: exact tests, and the risk that they keep."""

import warnings

import pytest
import torch
from scipy.stats import binom

from laplace_lora.evaluation import compare, evaluate
from laplace_lora.evaluation.risk_control import NEVER, answering_threshold


def classified(n, seed, power=1.0):
    """Probabilities of four classes, and labels drawn from them before they are sharpened."""
    generator = torch.Generator().manual_seed(seed)
    p = (2.5 * torch.randn(n, 4, generator=generator)).softmax(1)
    y = torch.multinomial(p, 1, generator=generator).squeeze(1)
    p = p.pow(power)
    return p / p.sum(1, keepdim=True), y


def by_hand(p, y, risk, certainty):
    """The last confidence that the tests reach, each threshold counted anew."""
    confidence, n = p.double().amax(1), len(y)
    steps, reached = [*sorted(confidence.tolist(), reverse=True), 0.0], []
    needed = next(k for k in range(n) if (1 - risk) ** k <= 1 - certainty)
    for step in steps:
        chosen = confidence > step
        if chosen.sum() < max(needed, n / 5):
            continue
        wrong = int((p.argmax(1) != y)[chosen].sum())
        if binom.cdf(wrong, int(chosen.sum()), risk) > 1 - certainty:
            break
        reached.append(step)
    return min(reached)


@pytest.mark.parametrize(("risk", "certainty"), [(0.1, 0.9), (0.2, 0.95), (0.15, 0.8)])
def test_the_threshold_is_the_lowest_that_tests_allow(risk, certainty):
    p, y = classified(400, 0)
    found = answering_threshold(p, y, risk, certainty)
    assert found == by_hand(p, y, risk, certainty) and 0.25 < found < 1


def test_equal_confidences_are_answered_together():
    p, y = classified(400, 1)
    p = (p * 20).round()
    p = p / p.sum(1, keepdim=True)
    assert answering_threshold(p, y, 0.1) == by_hand(p, y, 0.1, 0.9)


@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_is_not_rounded(seed):
    """Whose answers it counts are those above it in double precision, not in single."""
    p, y = classified(400, 20 + seed)
    p = p.double() / p.double().sum(1, keepdim=True)
    assert answering_threshold(p, y, 0.1) == by_hand(p, y, 0.1, 0.9)


@pytest.mark.filterwarnings("ignore:no threshold keeps:UserWarning")
def test_the_risk_is_kept_whatever_the_predictive():
    """In at least nine of ten calibrations, and not by answering nothing."""
    (p, y), above, answered = classified(50_000, 2, power=4.0), 0, []
    is_wrong, confidence = p.argmax(1) != y, p.double().amax(1)
    for seed in range(200):
        threshold = answering_threshold(*classified(200, 10 + seed, power=4.0), 0.15)
        chosen = confidence > threshold
        above += float(is_wrong[chosen].double().mean()) > 0.15
        answered.append(float(chosen.double().mean()))
    assert 0 < above / 200 < 0.1
    best = max(
        float((confidence > t).double().mean())
        for t in torch.linspace(0, 0.999, 500).tolist()
        if float(is_wrong[confidence > t].double().mean()) <= 0.15
    )
    assert 0.5 * best < sum(answered) / 200 < best


def given(batch):
    return batch["p"]


def batch_of(n, seed):
    p, y = classified(n, seed)
    return [{"p": p, "labels": y}]


@pytest.mark.slow
def test_a_report_has_what_is_answered_and_what_of_it_is_wrong():
    data, apart = batch_of(400, 3), batch_of(400, 4)
    report = evaluate(given, data, name="given", conformal_loader=apart, risk=0.1)
    chosen = report.probs.double().amax(1) > report.threshold
    is_wrong = report.probs.argmax(1) != report.labels
    assert report["answered"] == pytest.approx(float(chosen.double().mean()))
    assert report["error when answered"] == pytest.approx(float(is_wrong[chosen].double().mean()))
    assert 0 < report.errors["answered"] < 0.05 and "set size" in report.values
    assert report.to_dict()["threshold"] == report.threshold and "answered" in str(report)
    alone = evaluate(given, data, conformal_loader=apart, risk=0.1, coverage=None)
    assert alone.sets is None and alone["answered"] == report["answered"]
    careful = evaluate(given, data, conformal_loader=apart, risk=0.1, certainty=0.95)
    assert 0 < careful["answered"] < report["answered"]
    assert evaluate(given, data).threshold is None
    flat = evaluate(lambda b: b["p"].flip(0), data, name="flat")
    lines = compare([report, flat], ["answered", "error when answered"]).splitlines()
    assert [cell.strip() for cell in lines[-1].split("|")[2:4]] == ["higher", "as asked"]


def test_where_nothing_can_be_shown_nothing_is_answered():
    p, y = classified(300, 5)
    wrong = [{"p": p, "labels": (p.argmax(1) + 1) % 4}]
    with pytest.warns(UserWarning, match="so nothing is answered"):
        report = evaluate(given, [{"p": p, "labels": y}], conformal_loader=wrong, risk=0.1)
    assert report.threshold == NEVER and report["answered"] == 0
    assert "error when answered" not in report.values


def test_where_all_may_be_answered_all_is():
    p = torch.eye(3).repeat(40, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answering_threshold(p, p.argmax(1), 0.1) == 0.0


def test_refusals():
    p, y = classified(38, 6)
    with pytest.raises(ValueError, match="needs 22 labelled examples or more"):
        answering_threshold(p[:21], y[:21], 0.1)
    assert answering_threshold(p[:22], p[:22].argmax(1), 0.1) == 0.0  # with 22 it can be shown
    data = [{"p": p, "labels": y}]
    for name in ("risk", "certainty"):
        with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, got 1"):
            evaluate(given, data, conformal_loader=data, **{"risk": 0.1, name: 1})
    with pytest.raises(ValueError, match="give `conformal_loader`"):
        evaluate(given, data, risk=0.1)
    many = [{"p": torch.rand(9, 3), "labels": torch.randint(2, (9, 3)).float()}]
    with pytest.raises(ValueError, match="one class per example"):
        evaluate(given, many, conformal_loader=many, risk=0.1, coverage=None)
