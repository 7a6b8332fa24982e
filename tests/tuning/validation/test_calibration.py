"""Calibration of width and temperature on validation data."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.likelihoods.sigmoid import binary_log_probabilities
from laplace_lora.tuning.validation.calibration import WIDTHS
from laplace_lora.tuning.validation.calibration_search import (
    FOLDS,
    Found,
    folds_of,
    search,
)
from support.batches import loader, split_rows, token_batch, validation
from support.posteriors import DENSE, LOW, posterior
from support.references import assert_near, validation_nll


@pytest.mark.parametrize(
    "cls,kwargs,link,width",
    [
        *((KronLoraLaplace, LOW, "probit", width) for width in (0.1, 1.0, 10.0)),
        *(
            pytest.param(KronLoraLaplace, LOW, "mc", width, marks=pytest.mark.slow)
            for width in (0.1, 1.0, 10.0)
        ),
        (KronLoraLaplace, LOW, "quadrature", 10.0),
        (DiagLoraLaplace, {}, "probit", 10.0),
    ],
)
def test_calibration_mends_a_wrong_width(cls, kwargs, link, width):
    la = posterior(cls, **kwargs)
    la.optimize_prior_precision()
    tuned = la.prior_precision
    la.prior_precision = tuned / width
    start = validation_nll(la, link)
    generator = torch.Generator().manual_seed(0)
    result = la.calibrate(many(15), link_approx=link, generator=generator)
    after = validation_nll(la, link)
    assert result.nll_after <= result.nll_before
    if link == "probit":
        assert result.nll_before == pytest.approx(start, rel=1e-3)
        assert result.nll_after == pytest.approx(after, rel=1e-3)
    fine = []
    for factor in torch.logspace(-3, 3, 19):
        la.prior_precision = tuned * factor
        for scale in (0.3, 1.0, 3.0):
            la.covariance_scale, la.likelihood_temperature = scale, result.likelihood_temperature
            fine.append(validation_nll(la, link))
    assert after <= min(fine) * 1.02


@pytest.mark.parametrize("options", [{"n_samples": 0}, {"link_approx": "logit"}])
def test_calibration_for_a_predictive_that_does_not_exist_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        posterior(DiagLoraLaplace).calibrate(validation(), **options)


def test_width_and_temperature_are_in_force_until_the_next_tuning():
    la = posterior(**LOW)
    mean, covariance = la._glm_predictive_distribution(token_batch((4, 2)))
    la.covariance_scale, la.likelihood_temperature = 3.0, 2.0
    scaled = la._glm_predictive_distribution(token_batch((4, 2)))
    assert_near(list(scaled), [mean / 2, covariance * 3 / 4])
    la.optimize_prior_precision()
    assert la.covariance_scale == la.likelihood_temperature == 1


def test_calibration_widens_sampled_weights_too():
    la = posterior(name="bert", prior_precision=1e3, **DENSE)
    la.covariance_scale = 25.0
    batch = token_batch((4, 2))
    spread = la.functional_samples(batch, pred_type="nn", n_samples=200).var(0)
    expected = la._glm_predictive_distribution(batch)[1].diagonal(dim1=1, dim2=2)
    assert_near(spread, expected, 0.4)


def many(copies):
    """Validation sequences, each several times, so that labels outweigh any prior."""
    return DataLoader([*validation().dataset] * copies, batch_size=16)


@pytest.mark.slow
def test_how_far_a_mean_moves_is_calibrated():
    la = posterior(name="llama-lm", prior_precision=1e6, **LOW)
    la.recentre(0.1)
    shift = la.state.settings.shift
    result = la.calibrate(many(100))
    step = float((la.state.settings.shift @ shift) / (shift @ shift))
    assert not math.isclose(step, 1.0, abs_tol=0.01)
    torch.testing.assert_close(la.state.settings.shift, step * shift)
    assert validation_nll(la, "quadrature") == pytest.approx(result.nll_after, rel=0.02)
    for other in (0.8 * step, 1.2 * step):
        settings = replace(la.state.settings, shift=other * shift)
        la.state = la.state.with_settings(settings)
        assert validation_nll(la, "quadrature") > result.nll_after - 1e-4


@pytest.mark.slow
def test_cross_fitting_leaves_out_what_it_scores():
    la = posterior(**LOW)
    twin = posterior(**LOW)
    data = loader(lengths=(4, 6, 2, 5, 3, 6, 1, 4) * 4, seed=7)
    found = la.calibrate(data)
    rows = [row for batch in data for row in split_rows(batch)]
    folds = folds_of(torch.arange(len(rows)))
    total = 0.0
    for fold in range(FOLDS):
        twin.optimize_prior_precision(method="marglik")  # undoes a calibration
        twin.prior_precision = 1.0
        others = [row for i, row in enumerate(rows) if folds[i] != fold]
        twin.calibrate(DataLoader(others, batch_size=len(others)))
        mine = [row for i, row in enumerate(rows) if folds[i] == fold]
        batch = next(iter(DataLoader(mine, batch_size=len(mine))))
        p = twin(batch).gather(1, batch["labels"].unsqueeze(1))
        total -= float(p.log().sum())
    assert found.nll_cross_fitted == pytest.approx(total / len(rows), rel=0.03)


def test_reports_say_what_was_chosen():
    la = posterior(**LOW)
    text = str(la.calibrate(validation()))
    for word in (
        "prior precision",
        "covariance scale",
        "likelihood temperature",
        "cross-fitted",
        "ECE",
    ):
        assert word in text


def binary(mean, variance, labels):
    """Two classes as calibrations know them: by factor, scale and temperature."""

    def log_probabilities(point):
        _, scale, temperature = (math.exp(float(value)) for value in point)
        return binary_log_probabilities(mean / temperature, variance * scale / temperature**2)

    def losses(point):
        return -log_probabilities(point).gather(1, labels.unsqueeze(1)).squeeze(1)

    return SimpleNamespace(losses=losses, events=lambda point: log_probabilities(point).exp())


def alike(mean, labels):
    """Two classes whose logit is known but for its temperature."""

    def log_probabilities(point):
        logits = torch.stack([torch.zeros_like(mean), mean], -1)
        return (logits * math.exp(-float(point[0]))).log_softmax(-1)

    def losses(point):
        return -log_probabilities(point).gather(1, labels.unsqueeze(1)).squeeze(1)

    return SimpleNamespace(losses=losses, events=lambda point: log_probabilities(point).exp())


def on_a_grid(predictions, start, width, rows):
    """Average probabilities over one number's posterior, by a fine grid."""
    grid = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    points = [(start + width * float(z),) for z in grid]
    scores = torch.stack([-predictions.losses(point)[rows].sum() for point in points])
    weights = (scores - grid.square() / 2).softmax(0)
    p = torch.stack([predictions.events(point) for point in points])
    return torch.einsum("s,s...->...", weights, p), points


@pytest.mark.parametrize("rows", [6, 40, 2000])
def test_chosen_is_what_predicts_most_nearly_the_average(rows):
    """Of few labels, where it is not the best fit, and of many, where it is."""
    generator = torch.Generator().manual_seed(rows)
    mean = 3 * torch.randn(rows, generator=generator).double()
    labels = (torch.rand(rows, generator=generator) < torch.sigmoid(mean / 2)).long()
    predictions = alike(mean, labels)
    found = search(predictions, (-0.8,), (0.9,), torch.arange(rows))
    average, points = on_a_grid(predictions, -0.8, 0.9, slice(None))
    distances = [
        float((average.sqrt() - predictions.events(point).sqrt()).square().sum())
        for point in points
    ]
    nearest = points[min(range(len(points)), key=distances.__getitem__)]
    assert float(found.best[0]) == pytest.approx(nearest[0], abs=0.02)
    assert found.before == pytest.approx(float(predictions.losses((-0.8,)).mean()))
    assert found.after == pytest.approx(float(predictions.losses(found.best).mean()))
    best_fit = min(points, key=lambda point: float(predictions.losses(point).mean()))
    assert (abs(best_fit[0] - nearest[0]) < 0.02) == (rows == 2000)


def test_cross_fitted_are_the_rows_that_were_left_out():
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(20, generator=generator).double()
    labels = (torch.rand(20, generator=generator) < torch.sigmoid(mean / 2)).long()
    texts = torch.arange(20) // 2  # of two rows each
    found = search(alike(mean, labels), (0.0,), (0.9,), texts)
    folds = folds_of(texts)
    total = 0.0
    for fold in range(FOLDS):
        out = folds == fold
        others = search(alike(mean[~out], labels[~out]), (0.0,), (0.9,), texts[~out])
        total += float(alike(mean[out], labels[out]).losses(others.best).sum())
    assert found.cross_fitted == pytest.approx(total / 20, abs=2e-3)


def test_cross_fitting_does_not_depend_on_turns_that_classes_take():
    """Where every fifth row had the same label, no other fold had it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    logits = torch.randn(200, 5, generator=generator).double()
    classes = torch.arange(5).double()

    def searched(order):
        def log_probabilities(point):
            tilt = (classes - 2) * float(point[0])  # how frequent classes are
            return (logits[order] + tilt).log_softmax(-1)

        def losses(point):
            return -log_probabilities(point).gather(1, labels[order].unsqueeze(1)).squeeze(1)

        predictions = SimpleNamespace(
            losses=losses, events=lambda point: log_probabilities(point).exp()
        )
        return search(predictions, (1.0,), (1.0,), torch.arange(200)).cross_fitted

    # With a shuffle by the seed of the folds, turns would be folds again.
    orders = [torch.randperm(200, generator=generator.manual_seed(seed)) for seed in (0, 1, 42)]
    found = [searched(order) for order in (torch.arange(200), *orders)]
    assert max(found) - min(found) < 0.02


@pytest.mark.parametrize("count", [1, 3, 5, 13, 1000])
def test_folds_are_random_balanced_and_whole(count):
    groups = torch.arange(count).repeat(2) + 7
    torch.manual_seed(1)
    before = torch.get_rng_state()
    folds = folds_of(groups)
    assert torch.equal(before, torch.get_rng_state())  # global numbers are left alone
    torch.manual_seed(2)
    assert torch.equal(folds, folds_of(groups))
    assert torch.equal(folds[:count], folds[count:])
    sizes = folds[:count].bincount()
    assert len(sizes) == min(FOLDS, count) and sizes.max() - sizes.min() <= 1
    if count == 1000:  # a fifth of every fold in each fifth
        turns = torch.stack(
            [folds[start:count:FOLDS].bincount(minlength=FOLDS) for start in range(FOLDS)]
        )
        assert (turns.double() - 40).abs().max() < 20


@pytest.mark.parametrize("labels", [[0, 1], [0, 0]])
def test_a_single_text_has_no_others_that_choose_for_it(labels):
    mean, labels = torch.tensor([2.0, -3.0]).double(), torch.tensor(labels)
    found = search(alike(mean, labels), (0.0,), (0.9,), torch.zeros(2))
    assert found.after <= found.before and math.isnan(found.cross_fitted)


def test_labels_that_say_nothing_new_leave_the_start():
    """Where every move is worse on the rows themselves."""
    mean = torch.zeros(8, dtype=torch.float64)
    found = search(alike(mean, torch.arange(8) % 2), (0.3,), (1.0,), torch.arange(8))
    assert found.best == (0.3,) and found.after == found.before == found.cross_fitted


def test_a_width_that_is_better_by_its_standard_error_is_not_thrown_away():
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(400, generator=generator).double()
    variance = torch.tensor([0.1, 60.0]).double().repeat(200)
    p = binary_log_probabilities(mean, variance).exp()[:, 1]
    labels = (torch.rand(400, generator=generator) < p).long()
    predictions = binary(mean, variance, labels)
    losses = predictions.losses
    without = [losses((0.0, -40.0, t)) for t in torch.linspace(-2, 2, 81).tolist()]
    best = min(without, key=lambda values: float(values.mean()))
    gain = best - losses((0.0, 0.0, 0.0))
    error = float(gain.std()) / math.sqrt(400)
    assert float(gain.mean()) > error  # width matters here
    start = (0.0, math.log(0.02), 0.0)
    found = search(predictions, start, WIDTHS[:3], torch.arange(400))
    assert found.after < float(best.mean()) - error
    assert found.best[1] > start[1]


@pytest.mark.parametrize("rows,is_extreme", [(3, False), (400, True)])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_temperatures_need_evidence(rows, is_extreme, right):
    """Of labels that are all those of the larger logit, or as often those of the smaller."""
    mean = torch.full((rows,), 1.0 if right else 30.0, dtype=torch.float64)
    labels = torch.ones(rows, dtype=torch.long) if right else torch.arange(rows) % 2
    predictions = binary(mean, torch.full_like(mean, 1e-6), labels)
    found = search(predictions, (0.0, 0.0, 0.0), WIDTHS[:3], torch.arange(rows))
    temperature = math.exp(float(found.best[2]))
    assert (temperature < 0.2 or temperature > 20) == is_extreme


@pytest.mark.slow
def test_a_width_that_labels_speak_against_goes():
    """Of labels that are always the MAP's own class."""
    la = posterior(name="llama-lm", prior_precision=1e-2, **LOW)
    rows = [row for batch in many(60) for row in split_rows(batch)]
    batch = next(iter(DataLoader(rows, batch_size=len(rows))))
    batch["labels"] = la.model(batch).argmax(1)
    result = la.calibrate(DataLoader(split_rows(batch), batch_size=16))
    assert float(la.prior_precision) / la.covariance_scale > 100 * 1e-2
    assert la.likelihood_temperature < 0.2
    assert result.nll_after < 0.3 * result.nll_before


@pytest.mark.slow
def test_of_many_rows_some_are_searched_and_all_are_scored(monkeypatch):
    searched, found = [], []

    def counted(predictions, start, widths, groups):
        searched.append(len(groups))
        found.append(search(predictions, start, widths, groups))
        return found[-1]

    monkeypatch.setattr("laplace_lora.tuning.validation.calibration_search.search", counted)
    la = posterior(**LOW)
    la.prior_precision = 0.05
    data = many(12)
    before = validation_nll(la)
    whole = posterior(**LOW)
    whole.prior_precision = 0.05
    expected = whole.calibrate(data)
    monkeypatch.setattr("laplace_lora.tuning.validation.calibration_search.SEARCHED", 20)
    result = la.calibrate(data)
    assert searched[0] > searched[1] == 20
    assert result.nll_before == pytest.approx(before, rel=1e-3)
    assert result.nll_after == pytest.approx(validation_nll(la), rel=1e-3)
    assert result.nll_after < result.nll_before
    assert expected.nll_after <= result.nll_after + 1e-3
    losses = torch.cat(
        [-la(batch).gather(1, batch["labels"].unsqueeze(1)).log().squeeze(1) for batch in data]
    )
    which = torch.randperm(len(losses), generator=torch.Generator().manual_seed(0))
    others = losses[which[20:]].sum()
    cross_fitted = (20 * found[1].cross_fitted + float(others)) / len(losses)
    assert result.nll_cross_fitted == pytest.approx(cross_fitted, rel=1e-3)


def test_what_some_rows_choose_and_all_refuse_is_not_taken(monkeypatch):
    searching = "laplace_lora.tuning.validation.calibration_search"
    la, data = posterior(**LOW), validation()
    bad = Found((9.0, 0.0, -5.0), 0.3, 0.1, 0.2)  # a temperature of a hundredth
    monkeypatch.setattr(f"{searching}.SEARCHED", 3)
    monkeypatch.setattr(f"{searching}.search", lambda *_: bad)
    result = la.calibrate(data)
    assert result.nll_before == pytest.approx(validation_nll(la), rel=1e-3)
    assert result.nll_cross_fitted == result.nll_after == result.nll_before
    assert la.covariance_scale == la.likelihood_temperature == 1
