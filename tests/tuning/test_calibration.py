"""Calibration of width and temperature on validation data."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.likelihoods.quadrature import binary_log_probabilities
from laplace_lora.tuning import calibration
from laplace_lora.tuning.calibration import WIDTHS
from laplace_lora.tuning.calibration_search import NARROW, search, search_with_temperature
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


def test_calibration_is_in_force_until_the_next_fit_or_tuning():
    la = posterior(**LOW)
    plain = la(token_batch((4, 2)))
    mean, covariance = la._glm_predictive_distribution(token_batch((4, 2)))
    la.covariance_scale, la.likelihood_temperature = 3.0, 2.0
    scaled = la._glm_predictive_distribution(token_batch((4, 2)))
    assert_near(list(scaled), [mean / 2, covariance * 3 / 4])
    la.optimize_prior_precision()
    assert la.covariance_scale == la.likelihood_temperature == 1
    la.covariance_scale, la.prior_precision = 3.0, 1.0
    la.fit(loader())
    assert_near(la(token_batch((4, 2))), plain)


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


def penalised(la, data, start):
    """What a calibration minimises, from the predictive itself."""
    chosen = [
        float(la.prior_precision / start) if start is not None else 1.0,
        la.covariance_scale,
        la.likelihood_temperature,
    ]
    widths = (2.0, 1.0, 0.7)
    surprise = sum((math.log(c) / w) ** 2 for c, w in zip(chosen, widths, strict=True)) / 2
    rows = [row for batch in data for row in split_rows(batch)]
    batch = next(iter(DataLoader(rows, batch_size=len(rows))))
    losses = -la(batch).gather(1, batch["labels"].unsqueeze(1)).log()
    return float(losses.sum()) + surprise


def test_few_labels_change_little_and_the_sum_is_least(monkeypatch):
    monkeypatch.setattr(calibration, "search_with_temperature", lambda *given: search(*given[:-1]))
    moves = []
    for copies in (1, 15):
        la = posterior(name="llama-lm", **LOW)
        tuned = la.prior_precision.clone()
        la.calibrate(many(copies))
        least = penalised(la, many(copies), tuned)
        moves.append(abs(math.log(la.likelihood_temperature)))
        best = (la.prior_precision, la.covariance_scale, la.likelihood_temperature)
        for factor in (0.7, 1.4):
            for i in range(3):
                other = [value * (factor if i == j else 1) for j, value in enumerate(best)]
                la.prior_precision, la.covariance_scale, la.likelihood_temperature = other
                assert least <= penalised(la, many(copies), tuned) + 1e-2 * copies
    assert moves[0] < moves[1]


def test_how_far_a_mean_moves_is_calibrated():
    la = posterior(name="llama-lm", prior_precision=1e6, **LOW)
    la.recentre(0.1)
    shift = la.state.settings.shift
    result = la.calibrate(many(15))
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
    total = 0.0
    for fold in range(5):
        twin.optimize_prior_precision(method="marglik")  # undoes a calibration
        twin.prior_precision = 1.0
        others = [row for i, row in enumerate(rows) if i % 5 != fold]
        twin.calibrate(DataLoader(others, batch_size=len(others)))
        mine = [row for i, row in enumerate(rows) if i % 5 == fold]
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


def quadratic(targets):
    targets = torch.tensor(targets)
    return lambda point: (float(point[0]) - targets).square()


def test_what_helps_only_the_rows_it_was_chosen_from_is_left():
    options = ((0.0,), [(-1.0,), (1.0,)], (10.0,), torch.arange(5))
    # The mean, 0.2, is better for all five rows, but each row is worse off with the other four's.
    few = search(quadratic([2.5, -0.5, -0.5, -0.5, 0.0]), *options)
    assert few.best == (0.0,) and few.after == few.cross_fitted == few.before
    alike = search(quadratic([1.1, 0.9, 1.0, 1.2, 0.8]), *options)
    assert float(alike.best[0]) == pytest.approx(1.0, abs=0.02)
    assert alike.after < alike.cross_fitted < alike.before


CANDIDATES = [
    (0.0, scale, temperature)
    for scale in (-3.0, -1.5, 0.0, 1.5, 3.0)
    for temperature in (-0.7, -0.35, 0.0, 0.35, 0.7)
]


def binary(mean, variance, labels):
    """Losses of two classes as calibrations know them: by factor, scale and temperature."""

    def losses(point):
        _, scale, temperature = (math.exp(float(value)) for value in point)
        log_p = binary_log_probabilities(mean / temperature, variance * scale / temperature**2)
        return -log_p.gather(1, labels.unsqueeze(1)).squeeze(1)

    return losses


def test_a_width_that_is_better_by_its_standard_error_is_not_thrown_away():
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(400, generator=generator).double()
    variance = torch.tensor([0.1, 60.0]).double().repeat(200)
    p = binary_log_probabilities(mean, variance).exp()[:, 1]
    labels = (torch.rand(400, generator=generator) < p).long()
    losses = binary(mean, variance, labels)
    without = [losses((0.0, -40.0, t)) for t in torch.linspace(-2, 2, 81).tolist()]
    best = min(without, key=lambda values: float(values.mean()))
    gain = best - losses((0.0, 0.0, 0.0))
    error = float(gain.std()) / math.sqrt(400)
    assert float(gain.mean()) > error  # width matters here
    start = (0.0, math.log(0.02), 0.0)
    found = search(losses, start, CANDIDATES, WIDTHS, torch.arange(400))
    assert found.after < float(best.mean()) - error
    assert found.best[1] > start[1]


@pytest.mark.parametrize("rows,is_extreme", [(3, False), (400, True)])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_temperatures_need_evidence(rows, is_extreme, right):
    """Of labels that are all those of the larger logit, or as often those of the smaller."""
    mean = torch.full((rows,), 1.0 if right else 30.0, dtype=torch.float64)
    labels = torch.ones(rows, dtype=torch.long) if right else torch.arange(rows) % 2
    losses = binary(mean, torch.full_like(mean, 1e-6), labels)
    found = search(losses, (0.0, 0.0, 0.0), CANDIDATES, WIDTHS, torch.arange(rows))
    temperature = math.exp(float(found.best[2]))
    assert (temperature < 0.2 or temperature > 20) == is_extreme


def test_a_temperature_alone_is_chosen_where_no_width_helps():
    """Of labels that know of no width: three numbers, drawn to their present values, are behind."""
    generator = torch.Generator().manual_seed(1)
    mean = 6 * torch.randn(60, generator=generator).double()
    variance = torch.tensor([0.1, 60.0]).double().repeat(30)
    p = torch.sigmoid(mean / 6)
    labels = (torch.rand(60, generator=generator) < p).long()
    losses = binary(mean, variance, labels)
    options = ((0.0, 0.0, 0.0), CANDIDATES, WIDTHS, torch.arange(60))
    narrow = math.log(NARROW / 30)
    found = search_with_temperature(losses, *options, lambda value: (0.0, narrow, value))
    assert found.best[:2] == (0.0, narrow)
    assert math.exp(found.best[2]) == pytest.approx(6, rel=0.4)
    assert found.cross_fitted < search(losses, *options).cross_fitted
    # Next to no width is none: the losses are those of the temperature alone.
    assert_near(losses(found.best), losses((0.0, -40.0, found.best[2])), 1e-3)


def test_a_calibration_may_keep_next_to_no_width():
    """Of labels that are always the MAP's own class."""
    la = posterior(name="llama-lm", prior_precision=1e-2, **LOW)
    rows = [row for batch in many(2) for row in split_rows(batch)]
    batch = next(iter(DataLoader(rows, batch_size=len(rows))))
    batch["labels"] = la.model(batch).argmax(1)
    wide = la._glm_predictive_distribution(batch)[1]
    la.calibrate(DataLoader(split_rows(batch), batch_size=16))
    assert la.prior_precision == 1e-2
    assert la.covariance_scale < 1e-2
    scaled = la._glm_predictive_distribution(batch)[1]
    ratio = la.covariance_scale / la.likelihood_temperature**2
    assert_near(scaled, wide * ratio)  # which inputs are uncertain can still be told
