"""Predict a whole data set: everything a posterior says about it, in one pass, in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from laplace_lora.data.batches import has_labels, is_inputs_and_labels
from laplace_lora.data.distributed import Together, together
from laplace_lora.data.steps import steps
from laplace_lora.likelihoods.base import ANCHORED, Readout, integrated_variables
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.information import entropies, entropies_of
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.quadrature import ENTROPY_POINTS, averaged, normal_points
from laplace_lora.likelihoods.roots import anchored_matrix
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.inputs import batches_of_rows, kind_of
from laplace_lora.predictive.linear_samples import (
    AUTO,
    LinearSamples,
    SampledOrExact,
    seeded,
    takes_samples,
)
from laplace_lora.predictive.predictions import Predictions
from laplace_lora.predictive.query import LINK_SAMPLES
from laplace_lora.predictive.texts import encoded
from laplace_lora.structures.posterior import Posterior

T = TypeVar("T")


def predict(
    predictor: ExamplePredictor,
    data: Any,
    tokenizer: Any,
    batch_size: int,
    progress_bar: bool | None,
) -> Predictions:
    """Predict a whole data set, see `LoraLaplace.predict`."""
    if is_batch(data):
        return predictor(data)
    posterior = predictor.posterior
    order, batches = in_batches(posterior, *kind_of(data), tokenizer, batch_size)
    place = (Predictions, predictor, posterior, batches, progress_bar, order)
    return of_batches(*place, in_step=posterior.engine.passes_are_known)


def in_batches(
    posterior: Posterior, kind: str, items: Any, tokenizer: Any, batch_size: int
) -> tuple[Tensor | None, Iterable[Any]]:
    """Return the order of examples in batches where it is not that of the data, and the batches.

    Args:
        posterior: A fitted posterior.
        kind: What they are, see `kind_of`.
        items: Batches; texts or rows, those of similar length share a batch.
        tokenizer: The model's.
        batch_size: How many texts or rows are in a batch.

    Raises:
        TypeError: If an item is no text, see `encoded`.
        ValueError: See `encoded` and `batches_of_rows`.
    """
    if kind == "batches":
        return None, items
    if kind == "texts":
        are_questions = getattr(posterior.source, "target_ids", None) is not None
        are_followed = getattr(posterior.source, "answers_behind_texts", False)
        items = encoded(items, tokenizer, are_questions, are_followed)
    return batches_of_rows(items, tokenizer, batch_size)


def prediction_link(
    posterior: Posterior,
    name: str,
    n_samples: int | None,
    generator: torch.Generator | None,
    outputs: int | None = None,
) -> Link:
    """Return a link whose points, where it has any, also serve entropies.

    Args:
        posterior: A fitted posterior.
        name: See `Link`.
        n_samples: Samples of the ``"mc"`` link, 1000 by default.
        generator: Their source; a fixed seed by default.
        outputs: How many there are; as many as in the fit by default.
    """
    outputs = posterior.state.n_outputs if outputs is None else outputs
    columns = integrated_variables(posterior.objective, outputs)
    if name != "mc" and columns == 1:
        return Link(name)
    if name != "mc":
        points = normal_points(ENTROPY_POINTS, columns)
        return Link(name, points.to(posterior.device, posterior.dtype))
    size = (LINK_SAMPLES if n_samples is None else n_samples, columns)
    place: Any = {"dtype": posterior.dtype, "device": posterior.device}
    return Link(name, torch.randn(size, generator=seeded(posterior, generator), **place))


class ExamplePredictor:
    """Predicts the examples of any number of batches in the same way.

    Args:
        posterior: A fitted posterior.
        link_approx: Link of the exact method.
        n_samples: Samples of the weights, 64 by default; of the logits for ``"mc"``, 1000.
        generator: Their source, on the posterior's device; a fixed seed by default.
        method: See `takes_samples`.

    Raises:
        ValueError: If the posterior is a language model's, or an option is unknown or they do not
            go together.
    """

    def __init__(
        self,
        posterior: Posterior,
        link_approx: str,
        n_samples: int | None,
        generator: torch.Generator | None,
        method: str = AUTO,
    ) -> None:
        if posterior.objective.jacobian_refusal is not None:
            raise ValueError(
                "predict() does not support language-modeling posteriors; use generation.score"
            )
        self.posterior, samples = posterior, None
        if takes_samples(posterior, method, link_approx, n_samples, generator):
            samples = LinearSamples(posterior, n_samples, generator)
        self._choice = SampledOrExact(samples, method)
        # By number of outputs, which choices may have any of.
        self._links = lru_cache(
            partial(prediction_link, posterior, link_approx, n_samples, generator)
        )

    def __call__(self, batch: Any) -> Predictions:
        """Return the predictions of a batch, with its labels where it has any."""
        posterior = self.posterior
        is_labelled = has_labels(batch, posterior.label_key)
        labels = posterior.split(batch)[1] if is_labelled else None
        x = batch[0] if is_inputs_and_labels(batch) else batch
        readout = posterior.objective.readout(x)
        return self._choice(
            lambda samples: self._sampled(samples, x, readout, labels),
            lambda: self._exact(x, readout, labels),
        )

    def _sampled(
        self, samples: LinearSamples, x: Any, readout: Readout, labels: Tensor | None
    ) -> Predictions:
        mean, tangents = samples.tangents(x, readout)
        log_p = samples.log_softmax(mean, tangents, readout)
        total, information = entropies_of(log_p)
        covariance = torch.einsum("kni,knj->nij", tangents, tangents) / len(tangents)
        probs = readout.shown(averaged(log_p).exp())
        return Predictions(mean, covariance, probs, total, information, labels)

    def _exact(self, x: Any, readout: Readout, labels: Tensor | None) -> Predictions:
        if readout is LOGITS:
            return self._of_logits(x, labels)
        mean, covariance = self._moments(x, readout)
        if not readout.is_softmax:
            return Predictions(mean, covariance, labels=labels)
        link = self._links(mean.shape[1] + readout.relative)
        logits, spread, relative = readout.of_softmax(mean, covariance)
        probs = readout.shown(link.log_probabilities(logits, spread, relative).exp())
        total, information = entropies(logits, spread, link.noise, relative)
        return Predictions(mean, covariance, probs, total, information, labels)

    def _of_logits(self, x: Any, labels: Tensor | None) -> Predictions:
        """Return predictions from contrasts that are differentiated as such.

        The variance that all logits share may be so much larger that its rounding errors would
        hide theirs.
        """
        mean, covariance = self._moments(x, ANCHORED)
        contrasts, spread = mean[:, 1:], covariance[:, 1:, 1:]
        back = anchored_matrix(mean).inverse()
        mean, covariance = mean @ back.T, back @ covariance @ back.T
        link = self._links(mean.shape[1])
        seen = (contrasts, spread, True) if link.sees_contrasts else (mean, covariance)
        total, information = entropies(contrasts, spread, link.noise, relative=True)
        probs = link.log_probabilities(*seen).exp()
        return Predictions(mean, covariance, probs, total, information, labels)

    def _moments(self, x: Any, readout: Readout) -> tuple[Tensor, Tensor]:
        mean, covariance = Predictor(self.posterior).readout_moments(x, readout)
        return mean.detach(), covariance.detach()


def of_batches(
    kind: Callable[..., T],
    answer: Callable[[Any], T],
    posterior: Posterior,
    source: Iterable[Any],
    progress_bar: bool | None,
    order: Tensor | None = None,
    aligned: Callable[[list[T], Together], list[T]] = lambda parts, team: parts,
    in_step: bool = False,
) -> T:
    """Return the predictions of batches, those of all processes, in the order of the data.

    Args:
        kind: Class of the predictions, a dataclass of tensors; what some batches' have not, the
            whole has not.
        answer: From a batch to its predictions.
        posterior: A fitted posterior.
        source: Batches, a loader or a list.
        progress_bar: Whether to show progress, see `progress`.
        order: Of the examples in the batches, see `in_batches`.
        aligned: Gives the predictions of all batches the shape that they have together.
        in_step: Whether every batch takes equally many passes, see `together`.

    Raises:
        ValueError: If there are none.
    """
    place: Any = {"device": posterior.device, "runs": posterior.source, "in_step": in_step}
    with together(source, row_by_row=True, **place) as team:
        parts = []
        batches = team.batches(source, "Predicting", progress_bar)
        met = posterior.engine.recording.met
        for step in steps(batches, range(0), team, posterior.kind_of, met):
            found = answer(step.batch)
            if step.is_own:
                parts.append(found)
        parts = aligned(parts, team)
        names = [field.name for field in fields(cast(Any, kind))]
        columns = {name: [getattr(part, name) for part in parts] for name in names}
        present = {name: c for name, c in columns.items() if all(v is not None for v in c)}
        rows = team.rows(**present)
    if not rows:
        raise ValueError("there is nothing to predict: the data are empty")
    whole: Any = kind(**rows)
    return whole if order is None else whole[order.argsort()]


def is_batch(data: Any) -> bool:
    """Return whether data are one batch without labels beside it."""
    return isinstance(data, Mapping | Tensor)
