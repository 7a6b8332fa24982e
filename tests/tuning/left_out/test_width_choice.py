"""Choosing a width by left-out examples, and choosing none where they do not tell."""

import math

import pytest
import torch

from laplace_lora.tuning.left_out.width_choice import (
    CLEAR,
    FLAT,
    GRID,
    NARROW,
    STEP,
    WIDE,
    best_width,
    precisions_tried,
)

EXAMPLES = 400
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(EXAMPLES // 2)  # of mean zero
WIDEST, NARROWEST = (math.log(float(precision)) for precision in GRID[[0, -1]])


def losses(at_widest, at_best, place=3.0, noise=0.0):
    """Losses that fall and rise in straight lines, to zero where there is no width."""

    def of(log_precision):
        end, value = (WIDEST, at_widest) if log_precision < place else (NARROWEST, 0.0)
        share = (log_precision - place) / (end - place)
        return at_best + (value - at_best) * share + noise * SIGNS

    return of


BARE = torch.zeros(EXAMPLES, dtype=torch.float64)
ERROR = 1 / math.sqrt(EXAMPLES - 1)  # of the mean of `SIGNS`


def test_the_lowest_loss_between_the_points_of_the_grid():
    width = best_width(losses(1.0, -0.3), BARE)
    assert width.is_clear and math.log(width.prior_precision) == pytest.approx(3.0, abs=2e-3)
    assert (width.nll, width.gain) == pytest.approx((-0.3, 0.3), abs=1e-4)
    assert width.standard_error == pytest.approx(0.0, abs=1e-12)


def test_the_widest_is_taken_where_it_is_clearly_better_than_none():
    for noise, is_clear in ((0.9 * 0.3 / ERROR, True), (1.1 * 0.3 / ERROR, False)):
        width = best_width(losses(-0.3, -0.3, WIDEST, noise * CLEAR), BARE)
        assert width.standard_error == pytest.approx(noise * ERROR)
        assert (width.gain, width.is_clear) == (pytest.approx(0.3), is_clear)
        assert width.prior_precision == pytest.approx(float(GRID[0 if is_clear else -1]))


def test_an_unclear_gain_is_taken_where_the_widest_is_worse():
    width = best_width(losses(0.1, -0.01, noise=1.0), BARE)
    assert width.gain < CLEAR * width.standard_error
    assert width.is_clear and math.log(width.prior_precision) == pytest.approx(3.0, abs=2e-3)


def test_none_where_an_unclear_best_is_as_good_as_the_widest():
    width = best_width(losses(-0.01 + 0.9 * FLAT, -0.01, noise=1.0), BARE)
    assert not width.is_clear and width.prior_precision == pytest.approx(float(GRID[-1]))
    assert (width.nll, width.gain) == pytest.approx((-0.01, 0.01), abs=1e-4)


def test_examples_that_share_inputs_count_as_few():
    noise = 0.5 * 0.3 / ERROR
    of = losses(-0.3, -0.3, WIDEST, noise)
    alike = [i for i in range(EXAMPLES) if SIGNS[i] > 0]
    companions = {i: alike for i in alike}
    assert best_width(of, BARE).is_clear and not best_width(of, BARE, companions).is_clear


def test_a_single_example_has_no_standard_error():
    for at_widest, is_clear in ((0.1, True), (-0.3, False)):

        def of(log_precision, at_widest=at_widest):
            return losses(at_widest, -0.3)(log_precision)[:1]

        width = best_width(of, BARE[:1])
        assert math.isnan(width.standard_error) and width.is_clear is is_clear


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_the_narrowest_within_a_standard_error_of_the_best(noise):
    """Losses differ between examples in proportion to the distance from the best width."""
    place = 3.0

    def of(log_precision):
        away = log_precision - place
        return 0.02 * away**2 + noise * away * SIGNS

    narrow, best = best_width(of, BARE, narrow=True), best_width(of, BARE)
    assert math.log(best.prior_precision) == pytest.approx(place, abs=2e-3)
    limit = place + noise * ERROR / 0.02  # where the excess is a standard error
    step = math.log(float(GRID[1] / GRID[0]))
    assert limit - step < math.log(narrow.prior_precision) <= limit + 2e-3
    assert narrow.nll == pytest.approx(float(of(math.log(narrow.prior_precision)).mean()))
    single = best_width(lambda at: of(at)[:1], BARE[:1], narrow=True)
    assert single.prior_precision == pytest.approx(
        best_width(lambda at: of(at)[:1], BARE[:1]).prior_precision
    )


def test_the_usual_precisions_are_tried_where_a_unit_is_not_known_or_usual():
    for unit in (None, 0.0, math.inf, 1.0, 300.0, 9e4):
        assert precisions_tried(unit) == GRID.log().tolist()


@pytest.mark.parametrize("unit", [1e-9, 0.3, 2e5, 1e12])
def test_as_many_more_are_tried_as_a_unit_asks_for(unit):
    points = precisions_tried(unit)
    assert set(GRID.log().tolist()) <= set(points)
    steps = torch.tensor(points, dtype=torch.float64).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, STEP))
    narrow, wide = math.log(unit / NARROW), math.log(unit / WIDE)
    assert points[-1] >= narrow and points[0] <= wide
    if points[-1] > NARROWEST + STEP / 2:
        assert points[-1] - STEP < narrow
    if points[0] < WIDEST - STEP / 2:
        assert points[0] + STEP > wide


def test_none_is_tried_that_single_precision_does_not_have():
    for unit in (1e-60, 1e60):
        precisions = torch.tensor(precisions_tried(unit)).exp()
        assert bool(((precisions > 1e-31) & (precisions < 1e31)).all())


def test_a_width_that_changes_nothing_is_none():
    """What is left of the losses' differences is rounding, whose smallest value is anywhere."""
    rounding = 1e-15 * SIGNS

    def of(log_precision):
        return 1 + (rounding if log_precision < 12 else 2 * rounding.abs())

    for narrow in (False, True):
        width = best_width(of, BARE + 1, narrow=narrow, unit=1e-12)
        assert width.prior_precision == width.narrowest == pytest.approx(float(GRID[-1]))
