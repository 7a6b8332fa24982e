"""Which way of tuning is the default, and what it falls back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from laplace_lora.data.distributed import OtherProcessFailed
from laplace_lora.data.inapplicable import InapplicableError
from laplace_lora.display.warning import warn
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.groups import PriorStructure
from laplace_lora.tuning.left_out.leave_one_out import why_not
from laplace_lora.tuning.tuner import Tuner

# Of another process's error only the name of its class is known.
INAPPLICABLE = {InapplicableError.__name__, NoForwardDerivativeError.__name__}

Found = tuple[Settings, Mapping[str, Any]]  # and reports, as `Tuning` calls them


@dataclass(frozen=True)
class Request:
    """What a tuning on training data is asked for.

    Attributes:
        structure: Which tensors share a prior precision, see `prior_groups`.
        loader: The training data of the fit, ``None`` where they are not at hand.
        is_given: Whether the loader was given, and is not that of the fit.
        progress_bar: Whether to show progress, see `progress`.
        recentre: Whether leave-one-out may move the posterior's mean.
        tune_noise: Whether to choose a regression's noise as well.
    """

    structure: PriorStructure
    loader: Any
    is_given: bool
    progress_bar: bool | None
    recentre: bool
    tune_noise: bool


def by_training_data(tuner: Tuner, method: str, request: Request) -> Found:
    """Return settings and reports of leave-one-out, ``"loo"`` for short, or of ``"widest"``."""
    data = (request.structure, request.loader, request.progress_bar)
    if method == "loo":
        settings, left_out = tuner.leave_one_out(*data, request.recentre, request.tune_noise)
        return settings, {"leave_one_out": left_out}
    settings, texts, choice = tuner.widest(*data)
    return settings, {"widest": texts, "structure": choice}


def by_default(tuner: Tuner, request: Request, has_others: bool) -> tuple[str, str, Found | None]:
    """Return the method of ``"auto"``, why it is no better one, and what that found.

    Data that were given must be those of the fit; a loader of the fit may not give them again.

    Args:
        tuner: Of a fitted posterior.
        request: What is asked for.
        has_others: Whether there are arguments of other methods besides.

    Raises:
        ValueError: If the data that were given are others than those of the fit.
    """
    posterior = tuner.posterior
    texts = posterior.objective.jacobian_refusal is not None
    method = "widest" if texts else "loo"
    if has_others:
        reason = "arguments of other methods are given"
    elif texts:
        reason = "the training data are not at hand" if request.loader is None else ""
    elif request.structure != "scalar":
        reason = "the prior is no scalar"
    else:
        reason = why_not(posterior, request.loader) or ""
    if not reason:
        try:
            return method, "", by_training_data(tuner, method, request)
        except (ValueError, OtherProcessFailed) as error:  # in its pass over the data
            kinds = [c.__name__ for c in type(error).__mro__]
            if isinstance(error, OtherProcessFailed):
                kinds = [error.kind]
            if INAPPLICABLE.isdisjoint(kinds):
                if request.is_given or ValueError.__name__ not in kinds:
                    raise
                if not texts:
                    warn(f"the prior is tuned by the marginal likelihood: {error}")
            reason = str(error)
    if texts and not has_others:
        warn(
            "the prior is tuned by the marginal likelihood, which makes the posterior of a "
            f"model of tokens far too wide: {reason}",
        )
    return "marglik", reason, None
