"""How wide samples of the weights may be that are run as networks of their own.

By labels: the width with the best NLL of the average of the samples' softmaxes. Without labels:
the width at which that average is as uncertain, in its mean entropy, as the linearised predictive.
The same samples serve all widths, so that the average is a continuous function of the width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import has_labels, model_inputs
from laplace_lora.data.distributed import Together
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.information import entropy
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.network_samples import NetworkSamples
from laplace_lora.predictive.query import Query
from laplace_lora.predictive.weight_sampling import Network, sampled_network
from laplace_lora.structures.posterior import Posterior

CRITERIA = ("nll", "entropy")
WIDTHS = [4.0**power for power in range(-8, 2)]  # of the covariance
# Nats per label that a width may cost where none helps; not what `widest` allows training texts.
TOLERANCE = 0.0025
CLOSE = 0.01  # share of the wanted entropy by which an entropy may miss it
TRIALS = 4  # between two widths of the grid
EMPTY = "the loader gives no example to choose the width by"


@dataclass(frozen=True)
class ServedWidth:
    """The width of samples that are run as networks, and how it was chosen.

    Attributes:
        width: Factor of the posterior's covariance.
        criterion: ``"nll"``, ``"entropy"``, or ``"given"``.
        value: NLL or mean entropy of the average of the softmaxes at that width, in nats per
            example; per labelled token of texts, per label where labels do not exclude each other.
            ``None`` if the width was given.
        reference: With ``"nll"`` that of the posterior's mean alone, with ``"entropy"`` the
            linearised predictive's mean entropy.
        tried: All widths that were tried, with their values.
    """

    width: float
    criterion: str
    value: float | None = None
    reference: float | None = None
    tried: tuple[tuple[float, float], ...] = ()

    def __str__(self) -> str:
        text = f"covariance times {self.width:.3g}, by {self.criterion}"
        if self.value is None:
            return text
        other = "at the mean alone" if self.criterion == "nll" else "of the linearised predictive"
        return f"{text}: {self.value:.4f} nats, {self.reference:.4f} {other}"


def choose_width(
    samples: NetworkSamples,
    loader: Any,
    criterion: str | None,
    team: Together,
    progress_bar: bool | None,
) -> ServedWidth:
    """Choose the width at which some samples are served.

    A pass over the data with each sample for every width that is tried.

    Args:
        samples: The samples.
        loader: Batches, with labels for ``"nll"``; iterated over repeatedly.
        criterion: One of `CRITERIA`; ``None`` for ``"nll"`` where batches have labels.
        team: The processes that share the data.
        progress_bar: Whether to show progress, see `progress`.

    Raises:
        ValueError: If the likelihood has no probabilities, or the loader is empty or can be
            iterated over once only.

    Warns:
        UserWarning: If no width is better than none, or none that was tried is as uncertain as the
            linearised predictive.
    """
    posterior = samples.posterior
    _check(posterior, loader)
    if criterion is None:
        # A process may have no data; what the others' batches have holds for all.
        is_labelled = team.any_of(_is_labelled(posterior, loader))
        if is_labelled is None:
            raise ValueError(EMPTY)
        criterion = CRITERIA[0] if is_labelled else CRITERIA[1]
    objective = posterior.objective
    if criterion == "entropy" and (objective.predicts_tokens or objective.rows_are_tokens):
        raise ValueError(
            f"with likelihood={objective.name!r} the width is chosen by the NLL of labelled "
            "tokens: give batches with labels, or a width"
        )

    def mean_over(function: Callable[[Any], Tensor], title: str) -> float:
        total, count = 0.0, 0.0
        for batch in team.batches(loader, title, progress_bar, posterior.by_example):
            values = function(batch).double()
            total, count = total + float(values.sum()), count + len(values)
        total, count = team.total(total, count)
        if not count:
            raise ValueError(EMPTY)
        return total / count

    def nll(network: Network, batch: Any, width: float) -> Tensor:
        return -samples.label_log_probabilities(network, batch, width)

    def own_entropy(network: Network, batch: Any, width: float) -> Tensor:
        return entropy(samples.probabilities(network, model_inputs(batch), width))

    def linearised(batch: Any) -> Tensor:
        x = model_inputs(batch)
        p = Predictor(posterior)(x, Query())
        assert isinstance(p, Tensor)
        if objective.has_independent_labels:
            p = torch.stack([1 - p, p], dim=-1).flatten(0, 1)
        return entropy(p)

    function = nll if criterion == "nll" else own_entropy
    # Before the network has other weights, which may be the model's own.
    wanted = 0.0 if criterion == "nll" else mean_over(linearised, "Linearised predictive")
    with sampled_network(posterior) as network:

        def at(width: float) -> float:
            title = f"Trying width {width:.2g}"
            return mean_over(lambda batch: function(network, batch, width), title)

        return _of_least_nll(at) if criterion == "nll" else _of_entropy(at, wanted)


def _of_least_nll(at: Callable[[float], float]) -> ServedWidth:
    """Return the best of a grid, refined.

    Where none is better than the mean alone, the widest that is hardly worse: which adapters
    disagree tells of uncertainty all the same. So a grid that rises twice in a row is left only
    once one was better, or the last is more than hardly worse.
    """
    alone, tried = at(0.0), {}
    for width in WIDTHS:
        tried[width] = at(width)
        values = list(tried.values())
        rises = len(values) > 2 and values[-1] > values[-2] > values[-3]
        if rises and (min(values) < alone or values[-1] > alone + TOLERANCE):
            break
    best = min(tried, key=tried.__getitem__)
    for step in (2.0, 2.0**0.5) if tried[best] < alone else ():
        for width in (best / step, best * step):
            tried[width] = at(width)
        best = min(tried, key=tried.__getitem__)
    if tried[best] >= alone:
        within = [width for width in tried if tried[width] <= alone + TOLERANCE]
        best = max(within, default=best)
        warn(
            f"samples of no width predict the labels better than the posterior's mean alone "
            f"({alone:.4f} nats): taking the widest that costs at most {TOLERANCE} nats, width "
            f"{best:.2g} ({tried[best]:.4f})",
        )
    return ServedWidth(best, "nll", tried[best], alone, tuple(sorted(tried.items())))


def _of_entropy(at: Callable[[float], float], wanted: float) -> ServedWidth:
    """Return the width with an entropy, between the first two of a grid around it."""
    tried: dict[float, float] = {}

    def nearest() -> float:
        return min(tried, key=lambda width: abs(tried[width] - wanted))

    for width in WIDTHS:
        tried[width] = at(width)
        if tried[width] >= wanted:
            break
    below = [width for width in tried if tried[width] < wanted]
    best = nearest()
    if below and len(below) < len(tried):
        low, high = max(below), max(tried)
        for _ in range(TRIALS):
            best = nearest()
            if abs(tried[best] - wanted) <= CLOSE * wanted:
                break
            share = (wanted - tried[low]) / (tried[high] - tried[low])
            # Away from the ends, so that a curved function cannot hold on to one of them.
            middle = low * (high / low) ** min(max(share, 0.2), 0.8)
            tried[middle] = at(middle)
            low, high = (middle, high) if tried[middle] < wanted else (low, middle)
        best = nearest()
    elif abs(tried[best] - wanted) > CLOSE * wanted:
        warn(
            f"no width gives the samples the mean entropy of the linearised predictive, "
            f"{wanted:.4f} nats; width {best:.2g} has {tried[best]:.4f}. Labelled data would tell "
            "which is right",
        )
    return ServedWidth(best, "entropy", tried[best], wanted, tuple(sorted(tried.items())))


def _check(posterior: Posterior, loader: Any) -> None:
    objective = posterior.objective
    averages = objective.is_classifier or objective.predicts_tokens
    if objective.has_pairs or objective.has_spans or not averages:
        raise ValueError(
            f"no width can be chosen for likelihood={objective.name!r}: samples are served by "
            "averaging a softmax of each row of outputs, and it has none; give a width"
        )
    if iter(loader) is loader:
        raise ValueError(
            "the data are iterated over repeatedly; give a loader or a list of batches"
        )


def _is_labelled(posterior: Posterior, loader: Any) -> bool | None:
    """Return whether a loader's batches have labels, ``None`` if it gives this process none."""
    batch = next(iter(loader), None)
    return None if batch is None else has_labels(batch, posterior.label_key)
