"""`Predictions`: everything a posterior says about some data, in one pass and in its order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import together
from laplace_lora.likelihoods.links import Link, entropies
from laplace_lora.likelihoods.quadrature import ENTROPY_POINTS, normal_points
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.inputs import batches_of_rows, batches_of_texts, listed
from laplace_lora.structures.state import Posterior

SEED = 0  # of the samples, where no generator is given


@dataclass(frozen=True)
class Predictions:
    """The posterior predictive of some examples.

    Attributes:
        mean: Mean logits, regression means or rewards, ``(examples, outputs)``; for preference
            pairs the mean difference of their rewards, ``(examples, 1)``.
        covariance: Their covariance, ``(examples, outputs, outputs)``; without observation noise.
        probs: Class probabilities ``(examples, classes)``, ``None`` for regressions and single
            rewards.
        entropy: Entropy of the averaged softmax in nats, ``(examples,)``: total uncertainty.
        mutual_information: Its epistemic part, which more training data would remove.
        labels: Labels or targets, where all batches have them.
    """

    mean: Tensor
    covariance: Tensor
    probs: Tensor | None = None
    entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    labels: Tensor | None = None

    @property
    def aleatoric(self) -> Tensor | None:
        """The entropy's other part in nats: the mean entropy of the softmax under the posterior."""
        if self.entropy is None or self.mutual_information is None:
            return None
        return self.entropy - self.mutual_information

    @property
    def std(self) -> Tensor:
        """Standard deviation of each logit or regression mean, ``(examples, outputs)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.mean)

    def __getitem__(self, index: Any) -> Predictions:
        """Return the predictions of some examples: a slice, a mask or indices."""
        whole: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return Predictions(**{k: v[index] for k, v in whole.items() if v is not None})


def predict(
    predictor: Predictor,
    data: Any,
    tokenizer: Any,
    batch_size: int,
    link_approx: str,
    n_samples: int,
    generator: torch.Generator | None,
    progress_bar: bool,
) -> Predictions:
    """Predict a whole data set, see `LoraLaplace.predict`."""
    posterior = predictor.posterior
    objective = posterior.objective
    if objective.jacobian_refusal is not None:
        raise ValueError(
            "predict() does not support language-modeling posteriors; use generation.score"
        )
    columns = objective.n_columns(posterior.state.n_outputs) if objective.is_classifier else 0
    if link_approx == "mc":
        size = (n_samples, columns)
        place: Any = {"dtype": posterior.dtype, "device": posterior.device}
        if generator is None:  # the same answer at every call, and the global state untouched
            generator = torch.Generator(posterior.device).manual_seed(SEED)
        noise = torch.randn(size, generator=generator, **place)
    else:
        noise = normal_points(ENTROPY_POINTS, max(columns, 1)).to(posterior.device, posterior.dtype)
    link = Link(link_approx, noise)
    if _is_batch(data):
        return _of_batch(predictor, data, link)
    kind, items = listed(data)
    if kind == "batches":
        return _of_batches(predictor, items, link, progress_bar)
    collate = batches_of_texts if kind == "texts" else batches_of_rows
    order, batches = collate(items, tokenizer, batch_size)
    return _of_batches(predictor, batches, link, progress_bar)[order.argsort()]


def _of_batches(
    predictor: Predictor, source: Iterable[Any], link: Link, progress_bar: bool
) -> Predictions:
    with together(source, device=predictor.posterior.device) as team:
        batches = team.batches(source, "Predicting", progress_bar)
        parts = [_of_batch(predictor, batch, link) for batch in batches]
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Predictions)}
        whole = {name: c for name, c in columns.items() if all(v is not None for v in c)}
        joined: dict[str, Any] = team.rows(**whole)
        if not joined:
            raise ValueError("there is nothing to predict: the data are empty")
    return Predictions(**joined)


def _of_batch(predictor: Predictor, batch: Any, link: Link) -> Predictions:
    posterior = predictor.posterior
    labels = _labels(posterior, batch)
    x = batch[0] if not isinstance(batch, Mapping) and labels is not None else batch
    readout = posterior.objective.readout(x)
    moments = predictor.readout_moments(x, readout)
    mean, covariance = (moment.detach() for moment in moments)
    if not readout.is_softmax:
        return Predictions(mean, covariance, labels=labels)
    assert link.noise is not None
    probs = link.log_probabilities(mean, covariance, readout.relative).exp()
    total, aleatoric = entropies(mean, covariance, link.noise, readout.relative)
    return Predictions(mean, covariance, probs, total, total - aleatoric, labels)


def _is_batch(data: Any) -> bool:
    return isinstance(data, Mapping | Tensor)


def _labels(posterior: Posterior, batch: Any) -> Tensor | None:
    key = posterior.label_key
    unlabelled = key not in batch if isinstance(batch, Mapping) else len(batch) != 2
    return None if isinstance(batch, Tensor) or unlabelled else posterior.split(batch)[1]
