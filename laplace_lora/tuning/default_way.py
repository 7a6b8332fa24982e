"""Which way of tuning is the default, and what it falls back to."""

from __future__ import annotations

from laplace_lora.data.distributed import OtherProcessFailed
from laplace_lora.data.inapplicable import InapplicableError
from laplace_lora.display.warning import warn
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.tuning.left_out.leave_one_out import why_not
from laplace_lora.tuning.tuner import Found, Request, Tuner

# Of another process's error only the name of its class is known.
INAPPLICABLE = {InapplicableError.__name__, NoForwardDerivativeError.__name__}


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
            return method, "", tuner.by_training_data(method, request)
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
