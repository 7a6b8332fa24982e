"""The two ways to predict tokens, by name, and what each takes."""

from __future__ import annotations

SAMPLED, EXACT = "sampled", "exact"
METHODS = (SAMPLED, EXACT)


def check_method(method: str, link_approx: str | None) -> None:
    """Refuse unknown methods, and a link where nothing is linked.

    Raises:
        ValueError: If the method is unknown, or a link is given to ``"sampled"``.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == SAMPLED and link_approx is not None:
        raise ValueError(
            "link_approx integrates over exact moments; it needs method='exact' ('sampled' "
            "averages over samples of the weights)"
        )
