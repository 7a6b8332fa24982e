"""Which further arguments each method of tuning takes."""

from __future__ import annotations

from collections.abc import Iterable

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
        method: A method of `optimize_prior_precision`; one that is unknown is not looked at.
        given: Names of the arguments.

    Raises:
        TypeError: If there are any; says which method takes them.
    """
    if method not in OPTIONS:
        return
    for name in sorted(set(given) - set(OPTIONS[method])):
        takers = [repr(other) for other, names in OPTIONS.items() if name in names]
        of_others = f"; method={' or '.join(takers)} does" if takers else ""
        known = ", ".join(OPTIONS[method]) or "no further arguments"
        raise TypeError(f"method={method!r} takes no {name!r}{of_others}. It takes {known}")
