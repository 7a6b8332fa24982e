"""Let reporters close their runs after what a callback logs when training ends."""

from __future__ import annotations

from typing import Any

REPORTERS = "transformers.integrations"  # where MLflow's, trackio's and all others are


def reporters_behind(callback: Any, callbacks: list[Any]) -> None:
    """Put the reporters that stand before a callback right behind it.

    Those of MLflow, trackio, DVCLive and ClearML close their runs when training ends. All others
    keep their order: one that changes weights then is to do so before a posterior is fitted.

    Whoever is calling them one by one, the given one now, goes on with the same one.

    Args:
        callback: The callback.
        callbacks: Those of a `Trainer`, changed in place.
    """
    if callback not in callbacks:
        return
    place = callbacks.index(callback)
    reporters = [each for each in callbacks[:place] if _is_reporter(each)]
    others = [each for each in callbacks[:place] if not _is_reporter(each)]
    callbacks[: place + 1] = [*others, callback, *reporters]


def _is_reporter(callback: Any) -> bool:
    """Return whether a callback is one of those of ``report_to``, or its heir."""
    return any(f"{kind.__module__}.".startswith(f"{REPORTERS}.") for kind in type(callback).__mro__)
