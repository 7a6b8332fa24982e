"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings

PASSED_THROUGH = {"laplace_lora", "laplace", "torch", "transformers", "contextlib", "functools"}


def warn(message: str) -> None:
    """Warn, with the place of the innermost frame that is neither this library nor below it.

    Args:
        message: What is wrong, and what to do.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in PASSED_THROUGH:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
