"""Tune a prior on what the training examples would have been predicted to be without their labels.

Trained weights have seen every training label, and so have the features that a linearisation at
them would use: their residuals, and leave-one-out predictions put together from them, promise too
much. The *base* model's features have seen none. So the model is linearised where LoRA starts (its
zero matrices at zero), the precision is found at which this linear model fits the training labels
as closely as the trained network does, and its leave-one-out predictions stand for the network's on
new data. The posterior's width at each example is added to them, and the prior precision with the
best leave-one-out likelihood is chosen, see `best_width`.

Where the base model's leave-one-out predictions get better when it is fitted more closely, training
stopped too early: the posterior's mean is moved until it fits the labels as closely as is best, see
`closer_fit`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from laplace_lora.adapters.start import at_base, base_biases_were_trained
from laplace_lora.data.distributed import Together, is_sharded
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.evidence.marginal_likelihood import with_noise
from laplace_lora.tuning.left_out.cavity_widths import Covariances
from laplace_lora.tuning.left_out.closer_fit import closer_fit
from laplace_lora.tuning.left_out.examples import (
    TrainingExamples,
    examples_looked_at,
    is_enough,
    look_at,
)
from laplace_lora.tuning.left_out.linear_model import Mode
from laplace_lora.tuning.left_out.profiled_noise import ProfiledNoise, at_residual_noise
from laplace_lora.tuning.left_out.recentring import recentred
from laplace_lora.tuning.left_out.recentring_by_passes import Aim, TrainingPasses
from laplace_lora.tuning.left_out.report import LeaveOneOut
from laplace_lora.tuning.left_out.share_check import warn_if_shares_differ
from laplace_lora.tuning.left_out.unseen_labels import unseen_labels, with_unseen
from laplace_lora.tuning.left_out.width_choice import NONE, best_width


def why_not(posterior: Posterior, loader: Any) -> str | None:
    """Return why a posterior cannot be tuned by leave-one-out at reasonable cost.

    Args:
        posterior: A fitted posterior.
        loader: Its training data; ``None`` where they are not at hand.

    Returns:
        The reason, ``None`` where there is none.
    """
    objective, state = posterior.objective, posterior.state
    if objective.jacobian_refusal is not None:
        return objective.jacobian_refusal
    if loader is None:
        return "the training data are not at hand"
    if not is_enough(posterior):
        return f"{state.n_outputs} outputs are too many"
    if examples_looked_at(posterior) < state.n_data and is_sharded(loader):
        return f"processes share more training examples than {examples_looked_at(posterior)}"
    try:
        at_base(posterior.source)
    except ValueError as error:
        return str(error)
    return None


def tune(
    posterior: Posterior,
    loader: Any,
    team: Together,
    progress_bar: bool | None,
    recentre: bool,
    tune_noise: bool,
) -> tuple[Settings, LeaveOneOut]:
    """Choose a scalar prior precision by leave-one-out, the posterior's mean, and its noise.

    Iterates once over the data, see `look_at`, and again if the mean is moved, see `recentred`.

    Args:
        posterior: A fitted posterior as its fit left it.
        loader: Its training data.
        team: The processes that share the loader.
        progress_bar: Whether to show progress, see `progress`.
        recentre: Move the posterior's mean where training stopped too early, see the module.
        tune_noise: Whether to choose a regression's observation noise as well.

    Returns:
        The settings, and what they promise.

    Raises:
        ValueError: If the adapter did not start at the base model, or the data are not those of the
            fit.
    """
    if tune_noise:
        posterior = at_residual_noise(posterior)
    examples = look_at(posterior, loader, team, progress_bar)
    mode = examples.linear.fitted_like(examples.nll)
    closer = _closer(examples, mode) if recentre else mode
    moved = None
    if closer is not mode:
        data = TrainingPasses(posterior, loader, team, examples.scoring.readout, progress_bar)
        nll = closer.nll / len(examples.labels)
        moved = recentred(data, Aim(nll, rivals=examples.n_rivals))
        if examples.rivals is None:
            trained = (examples.scoring, examples.cache.mean, examples.labels)
            warn_if_shares_differ(posterior.objective, *trained)
    mean, covariances = examples.without(closer), Covariances(examples, team)
    noise = float(posterior.settings.sigma_noise.detach())
    unit = covariances.largest_under_prior / noise**2 if posterior.objective.has_noise else None
    profile = ProfiledNoise(noise, mean, examples.labels) if tune_noise else None
    losses = partial(examples.losses, mean) if profile is None else profile.losses
    width = best_width(
        lambda log_precision: losses(covariances(math.exp(log_precision))),
        losses(examples.no_covariance),
        examples.left_out_together,
        narrow=tune_noise,
        unit=unit,
    )
    precision = width.prior_precision
    if profile is not None:
        factor = profile.factor(covariances(precision))
        noise *= math.sqrt(factor)
        none = NONE * width.narrowest
        precision = precision if precision > none else min(precision / factor, none)
    report = LeaveOneOut(
        prior_precision=precision,
        nll_map=width.nll + width.gain,
        nll=width.nll,
        standard_error=width.standard_error,
        base_precision=closer.precision,
        examples=len(examples.labels),
        recentring=None if moved is None else moved[1],
        sharing=len(examples.left_out_together),
        too_many=covariances.too_many,
        rivals=examples.n_rivals,
        is_unclear=not width.is_clear,
        is_sharing_unknown=not examples.inputs.is_known,
        knows_labels=base_biases_were_trained(posterior.source),
        noise=noise if tune_noise else None,
        narrowest=width.narrowest,
    )
    settings = replace(
        (with_noise(posterior, noise) if tune_noise else posterior).settings,
        prior_precision=examples.first_precision.new_tensor([precision]),
        shift=None if moved is None else moved[0],
    )
    return settings, report


def _closer(examples: TrainingExamples, mode: Mode) -> Mode:
    """Return the closer fit of the base model that is best left out; the mode if there is none."""
    labels, classes = examples.labels, examples.cache.mean.shape[1] + 1
    objective = examples.predictor.posterior.objective
    unseen = [] if examples.rivals else unseen_labels(objective, labels, classes)

    def losses(mean: Tensor, labels: Tensor) -> Tensor:
        return examples.losses(mean, examples.no_covariance, labels)

    charged = with_unseen(losses, labels, unseen)
    left_out = partial(examples.without, companions=examples.companions)
    return closer_fit(examples.linear, mode, left_out, charged, examples.companions)
