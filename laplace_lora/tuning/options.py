"""Which arguments each method of tuning takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from laplace_lora.likelihoods.links import LINKS
from laplace_lora.structures.settings import check_count

MARGLIK = ("n_steps", "lr", "init_prior_prec")
GRID = ("loss", "log_prior_prec_min", "log_prior_prec_max", "log_prior_prec_base", "grid_size")
OPTIONS = {
    "auto": MARGLIK,
    "loo": (),
    "widest": (),
    "marglik": MARGLIK,
    "gridsearch": GRID,
    "val_gd": ("n_steps", "lr"),
}


def check_options(method: str, given: Iterable[str]) -> None:
    """Refuse arguments that a method would not use.

    Args:
        method: A method of `optimize_prior_precision`.
        given: Names of the arguments.

    Raises:
        TypeError: If there are any; says which method takes them.
        ValueError: If the method is unknown.
    """
    if method not in OPTIONS:
        *names, last = map(repr, OPTIONS)
        raise ValueError(f"method must be {', '.join(names)} or {last}, got {method!r}")
    for name in sorted(set(given) - set(OPTIONS[method])):
        takers = [repr(other) for other, names in OPTIONS.items() if name in names]
        of_others = f"; method={' or '.join(takers)} does" if takers else ""
        known = ", ".join(OPTIONS[method]) or "no further arguments"
        raise TypeError(f"method={method!r} takes no {name!r}{of_others}. It takes {known}")


def check_predictive(pred_type: str, link_approx: str, n_samples: int) -> None:
    """Refuse a predictive that does not exist, whether or not a method scores one.

    laplace-torch's callers name one for every method, so one that exists may have no effect.

    Raises:
        ValueError: If type or link is unknown, or there are no samples.
    """
    if pred_type not in ("glm", "nn"):
        raise ValueError(f"pred_type must be 'glm' or 'nn', got {pred_type!r}")
    if link_approx not in LINKS:
        raise ValueError(f"link_approx must be one of {LINKS}, got {link_approx!r}")
    check_count("n_samples", n_samples)


def check_evidence_options(
    method: str, tune_noise: bool, correction: bool | None, recentre: bool, by_laplace_torch: bool
) -> None:
    """Refuse what another method, or laplace-torch's own loop, would ignore.

    Args:
        method: As of `check_options`.
        tune_noise: Whether a regression's noise is to be tuned.
        correction: Whether the evidence's gradient term is asked for.
        recentre: Whether leave-one-out may move the mean, as by default.
        by_laplace_torch: Whether laplace-torch's own loop maximises the evidence.

    Raises:
        ValueError: If one of them would have no effect.
    """
    arguments = [
        ("correction=True", correction, ("marglik",)),
        ("tune_sigma_noise=True", tune_noise, ("loo", "marglik")),
        ("recentre=False", not recentre, ("loo",)),
    ]
    for argument, is_given, takers in arguments:
        if not is_given:
            continue
        if method not in ("auto", *takers):
            methods = " or ".join(f"method={taker!r}" for taker in takers)
            raise ValueError(f"{argument} belongs to {methods}; got method={method!r}")
        if by_laplace_torch:
            names = ", ".join(repr(name) for name in MARGLIK)
            raise ValueError(
                f"{argument} does not go together with {names} or prior_structure='diag', for "
                "which laplace-torch's own loop tunes the prior precision alone"
            )


def check_loaders(method: str, val_loader: Any, has_training: bool) -> None:
    """Refuse data that a method does not read.

    Args:
        method: As of `check_options`.
        val_loader: Validation data, ``None`` for none.
        has_training: Whether training data are given.

    Raises:
        ValueError: If there are some.
    """
    on_validation = method in ("gridsearch", "val_gd")
    if not on_validation and val_loader is not None:
        raise ValueError(f"method={method!r} uses no validation data; leave `val_loader` out")
    if on_validation and has_training:
        raise ValueError(f"method={method!r} uses no training data; leave `train_loader` out")
