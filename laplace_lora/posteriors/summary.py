"""A posterior in six lines."""

from __future__ import annotations

import math

from laplace_lora.display.tables import span
from laplace_lora.models.wrapped_model import base_of
from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.evidence.marginal_likelihood import with_term
from laplace_lora.tuning.outcome import Tuning

SHOWN_LAYERS = 6


def summary(posterior: Posterior, evidence: float | None, tuning: Tuning | None) -> str:
    """Return six lines: what a posterior is and covers, prior, evidence, data, calibration.

    Args:
        posterior: Fitted or not.
        evidence: Its log evidence in nats without the gradient term; ``None`` before a fit.
        tuning: What the latest tuning of the prior did.
    """
    title, lines = summary_lines(posterior, evidence, tuning)
    return "\n".join([title, *(f"  {name:<11}{text}" for name, text in lines.items())])


def summary_lines(
    posterior: Posterior, evidence: float | None, tuning: Tuning | None
) -> tuple[str, dict[str, str]]:
    """Return a title, and the other lines by topic, see `summary`."""
    state = posterior.state
    lines = {
        "covers": _covered(posterior.names, sum(posterior.engine.sizes)),
        "prior": _prior(posterior, tuning),
        "evidence": "none before a fit"
        if evidence is None
        else _evidence(posterior, evidence, tuning),
        "data": "none: call fit(train_loader)",
        "calibrated": _calibration(posterior),
    }
    if state.is_fitted:
        lines["data"] = (
            f"{state.n_data} examples, mean training loss {state.loss / state.n_data:.4g}"
        )
    base = base_of(posterior.source.model)
    is_known = state.is_fitted and posterior.objective.counts_model_outputs
    outputs = f", {state.n_outputs} outputs" if is_known else ""
    title = f"{posterior.kind}: {posterior.objective.name} by {type(base).__name__}{outputs}"
    return title, lines


def _covered(names: list[str], weights: int) -> str:
    layers = list(dict.fromkeys(map(_layer, names)))
    some = ", ".join(layers[:SHOWN_LAYERS]) + (", ..." if len(layers) > SHOWN_LAYERS else "")
    return f"{weights:,} weights in {len(names)} tensors, of {some}"


def _layer(name: str) -> str:
    """Return what users call the layer of a tensor: the part that ``target_modules`` names."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if i and (part.startswith("lora_") or part == "modules_to_save"):
            return parts[i - 1]
    return parts[-2] if len(parts) > 1 else name


def _prior(posterior: Posterior, tuning: Tuning | None) -> str:
    settings = posterior.settings
    around = "zero" if not bool(settings.prior_mean.any()) else "given weights"
    text = f"precision {span(settings.prior_precision, 4)} around {around}"
    if posterior.objective.has_noise:
        text += f", noise {float(settings.sigma_noise.detach()):.4g}"
    return text if tuning is None else f"{text}, tuned by {tuning.method}"


def _evidence(posterior: Posterior, plain: float, tuning: Tuning | None) -> str:
    if math.isnan(plain):
        return "not known: the training loss is not"
    value = with_known_term(posterior)
    if value is not None:
        if posterior.objective.is_classifier and value > 0:
            return "not credible under this prior: above zero with its gradient term"
        return f"{value:.4f} nats"
    if tuning is not None and tuning.method == "marglik":
        return f"{plain:.4f} nats, without the gradient term"
    # The plain one charges for where weights started, and so says little of other priors.
    return "not measured; log_marginal_likelihood(correction=True) takes passes over the data"


def with_known_term(posterior: Posterior) -> float | None:
    """Return a fitted posterior's log evidence with its gradient term; ``None`` if not known."""
    prior = posterior.settings.prior_precision
    if posterior.gradient_term is None or len(prior) not in (1, len(posterior.names)):
        return None
    return float(with_term(posterior).detach())


def _calibration(posterior: Posterior) -> str:
    settings = posterior.settings
    parts = []
    if settings.covariance_scale != 1:
        parts.append(f"covariance scale {settings.covariance_scale:.4g}")
    if settings.likelihood_temperature != 1:
        parts.append(f"likelihood temperature {settings.likelihood_temperature:.4g}")
    if settings.shift is not None:
        parts.append("mean moved to the linearised model's mode")
    return ", ".join(parts) or "nothing: width, temperature and mean as fitted"
