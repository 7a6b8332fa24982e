"""Tune a prior on what the training examples would have been predicted to be without their labels.

Trained weights have seen every training label, and so have the features that a linearisation at
them would use: their residuals, and leave-one-out predictions put together from them, promise too
much. The *base* model's features have seen none. So the model is linearised where LoRA starts (its
zero matrices at zero), the precision is found at which this linear model fits the training labels
as closely as the trained network does, and its leave-one-out predictions stand for the network's on
new data. The posterior's width at each example is added to them, and the prior precision with the
best leave-one-out likelihood is chosen, see `best_width`.

An example that shares an input with others, as preference pairs do a text, is left out together
with them, unless inputs come again and again with other labels. Where there are too many classes
its own is told apart from some, see `Rivals`.

Where the base model's leave-one-out predictions get better when it is fitted more closely, training
stopped too early: the posterior's mean is moved until it fits the labels as closely as is best, see
`closer_fit`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.start import trained_biases, zero_at_start
from laplace_lora.data.distributed import Together, is_sharded
from laplace_lora.data.subset import Subset
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.read_columns import ReadColumns
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.evidence.marginal_likelihood import first_precision, with_noise
from laplace_lora.tuning.left_out.cavity_widths import CavityWidths
from laplace_lora.tuning.left_out.closer_fit import closer_fit
from laplace_lora.tuning.left_out.function_rows import base_rows
from laplace_lora.tuning.left_out.linear_model import Mode
from laplace_lora.tuning.left_out.looked_at import columns_looked_at, examples_looked_at, is_enough
from laplace_lora.tuning.left_out.profiled_noise import ProfiledNoise, at_residual_noise
from laplace_lora.tuning.left_out.recentring import BYTES, columns_of, recentred
from laplace_lora.tuning.left_out.report import LeaveOneOut
from laplace_lora.tuning.left_out.rivals import Rivals
from laplace_lora.tuning.left_out.share_check import warn_if_shares_differ
from laplace_lora.tuning.left_out.shared_inputs import SharedInputs
from laplace_lora.tuning.left_out.unseen_labels import unseen_labels, with_unseen
from laplace_lora.tuning.left_out.width_choice import NONE, best_width
from laplace_lora.tuning.same_data import check_same_data
from laplace_lora.tuning.validation.cache import ValidationCache, scoring_of

# Of the examples: where inputs come again and again, with labels of their own, new data will be of
# the same inputs. What is known of others, all copies left out, says nothing about these.
CONTRADICTED = 0.25


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
        zero_at_start(posterior.source)
    except ValueError as error:
        return str(error)
    return None


def tune(
    posterior: Posterior,
    loader: Any,
    team: Together,
    progress_bar: bool | None,
    recentre: bool = True,
    tune_noise: bool = False,
) -> tuple[Settings, LeaveOneOut]:
    """Choose a scalar prior precision by leave-one-out, the posterior's mean, and its noise.

    Iterates once over the data: the Jacobians at the base model, and those at the trained weights.
    Of more than `ROWS` examples times contrasts a random subset is looked at. Iterates
    again if the mean is moved, see `recentred`.

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
    posterior.engine.check_outputs_few()
    if tune_noise:
        posterior = at_residual_noise(posterior)
    scoring = scoring_of(posterior, QUADRATURE, 0)
    n_data = posterior.state.n_data
    groups = torch.zeros(len(posterior.names), dtype=torch.long)
    scalar = posterior.with_settings(first_precision(posterior))
    count, columns = examples_looked_at(posterior), columns_looked_at(posterior)
    n_outputs = posterior.state.n_outputs
    rivals = Rivals(n_outputs, columns) if columns < columns_of(posterior) else None
    readout = scoring.readout if rivals is None else rivals.readout
    n_rivals = 0 if rivals is None else columns
    subset = None if count == n_data else Subset(loader, n_data, count, posterior.by_example)
    numbers = BYTES / (4 * count * columns)
    is_exact = posterior.structure.couples_groups  # its curvature is a sum over examples
    inputs = SharedInputs(posterior.label_key, ReadColumns(posterior.source.model), is_exact)
    predictor = Predictor(scalar)
    with base_rows(posterior, readout, numbers) as rows:

        def watch(x: Any, y: Tensor) -> None:
            if rivals is not None:
                rivals.draw(y)
            rows.add(x, y)
            inputs.add(x, y)

        options = (groups, readout, progress_bar, watch, team, "Leaving each example out")
        cache = ValidationCache(predictor, subset or loader, *options)
    seen = len(cache.y) if subset is None else subset.seen
    labels = cache.y if rivals is None else torch.zeros_like(cache.y)
    linear, outputs = rows.linear_model(labels, team), cache.mean.double()
    nll = linear.nll(outputs)
    is_whole = subset is None and rivals is None
    loss = nll / float(posterior.scale.detach()) if is_whole else None
    check_same_data(posterior.state, seen, loss, "leave-one-out")
    companions = inputs.companions(team)
    nothing = cache.mean.new_zeros(*cache.mean.shape, cache.mean.shape[-1])

    def without(mode: Mode, together: dict[int, list[int]] = companions) -> Tensor:
        return linear.leave_one_out(mode, together)[0].to(cache.mean)

    def narrow(mean: Tensor, labels: Tensor) -> Tensor:
        return scoring.nll(mean, nothing, labels).double()

    mode, moved = linear.fitted_like(nll), None
    if recentre:
        classes = cache.mean.shape[1] + 1
        unseen = [] if rivals else unseen_labels(posterior.objective, labels, classes)
        charged = with_unseen(narrow, labels, unseen)
        closer = closer_fit(linear, mode, without, charged, companions)
        if closer is not mode:
            closest = posterior.temperature * closer.nll / len(cache.y)
            whole = (posterior, loader, team, scoring.readout, progress_bar, closest)
            moved = recentred(*whole, rivals=n_rivals)
            if rivals is None:
                warn_if_shares_differ(posterior.objective, scoring, cache.mean, labels)
            mode = closer
    drawn_again = inputs.contradicted(cache.y) > CONTRADICTED * len(cache.y)
    left_out_with = {} if drawn_again else companions
    mean = without(mode, left_out_with)
    widths = None
    if is_exact:
        root = linear.root(outputs).to(cache.mean)
        of_widths = left_out_with if rivals is None else {}
        widths = CavityWidths(predictor, readout, root, inputs, of_widths, team)

    def covariance_at(log_precision: float) -> Tensor:
        delta = math.exp(log_precision)
        factor = delta / float(scalar.settings.prior_precision)
        covariance = cache.covariance(cache.mean.new_tensor([factor]))
        return covariance if widths is None else widths.without(covariance, delta)

    noise = float(posterior.settings.sigma_noise.detach())
    profile = ProfiledNoise(noise, mean, labels) if tune_noise else None

    def losses(covariance: Tensor) -> Tensor:
        if profile is not None:
            return profile.losses(covariance)
        return scoring.nll(mean, covariance, labels).double()

    width = best_width(
        lambda at: losses(covariance_at(at)), losses(nothing), left_out_with, narrow=tune_noise
    )
    precision = width.prior_precision
    if profile is not None:
        factor = profile.factor(covariance_at(math.log(precision)))
        noise *= math.sqrt(factor)
        precision = precision if precision > NONE else min(precision / factor, NONE)
    report = LeaveOneOut(
        prior_precision=precision,
        nll_map=width.nll + width.gain,
        nll=width.nll,
        standard_error=width.standard_error,
        base_precision=mode.precision,
        examples=len(labels),
        recentring=None if moved is None else moved[1],
        sharing=len(left_out_with),
        too_many=0 if widths is None else widths.too_many,
        rivals=n_rivals,
        is_unclear=not width.is_clear,
        is_sharing_unknown=not inputs.is_known,
        knows_labels=trained_biases(posterior.source),
        noise=noise if tune_noise else None,
    )
    settings = replace(
        with_noise(posterior, noise) if tune_noise else posterior.settings,
        prior_precision=scalar.settings.prior_precision.new_tensor([precision]),
        shift=None if moved is None else moved[0],
    )
    return settings, report
