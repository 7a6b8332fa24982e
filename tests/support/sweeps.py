"""Sweeps over many cases, of which the default run takes a few."""

import pytest


def rest_slow(cases, *fast):
    """Return a test's cases, all but some as slow ones.

    Args:
        cases: As `pytest.mark.parametrize` takes them.
        fast: Places of those that the default run takes.
    """
    return [
        case
        if place in fast
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for place, case in enumerate(cases)
    ]
