"""Samples of the linearised model on a whole pool: what its examples have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import model_inputs
from laplace_lora.data.distributed import together
from laplace_lora.likelihoods.base import Readout
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.predictive.data_sets import in_batches, is_batch
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.inputs import kind_of
from laplace_lora.predictive.linear_samples import seeded
from laplace_lora.structures.posterior import Posterior


@dataclass(frozen=True)
class JointSamples:
    """Contrasts of the classes, under weights that are common to all examples.

    Attributes:
        mean: Of the contrasts to the first class, ``(examples, contrasts)``.
        deviations: From the mean under each sample of the weights, ``(samples, examples,
            contrasts)``.
    """

    mean: Tensor
    deviations: Tensor

    def more(self, count: int, generator: torch.Generator) -> JointSamples:
        """Return at least so many samples, drawn with the covariance that these have.

        The linearised model's outputs are Gaussian, so that of a finite pool they can be drawn
        without the weights, whose number they do not depend on.

        Args:
            count: How many there are to be.
            generator: Their source.
        """
        known = self.deviations
        if count <= len(known):
            return self
        size = (count, len(known))
        noise = torch.randn(size, dtype=known.dtype, device=known.device, generator=generator)
        return JointSamples(self.mean, torch.tensordot(noise / len(known) ** 0.5, known, 1))

    def log_probabilities(self) -> Tensor:
        """Return log probabilities of the classes, ``(samples, examples, classes)``, float64."""
        contrasts = (self.mean + self.deviations).double()
        return torch.nn.functional.pad(contrasts, (1, 0)).log_softmax(-1)


def joint_samples(
    posterior: Posterior,
    pool: Any,
    tokenizer: Any,
    batch_size: int,
    n_samples: int,
    generator: torch.Generator | None,
    progress_bar: bool | None,
) -> JointSamples:
    """Return samples of a pool's contrasts, one after the other in its order.

    ``J (θ_s − θ*)`` from exact Jacobians: a forward pass and ``C − 1`` backward passes an example,
    whatever the number of samples, which are held as ``(samples, parameters)``.

    Args:
        posterior: A fitted posterior of a classifier.
        pool: Data, see `LoraLaplace.predict`.
        tokenizer: The model's.
        batch_size: Texts or rows per batch.
        n_samples: Samples of the weights.
        generator: Their source, on the posterior's device; a fixed seed by default.
        progress_bar: Whether to show progress, see `progress`.

    Raises:
        ValueError: If the pool is empty.
    """
    predictor = Predictor(posterior)
    directions = posterior.deviations(n_samples, seeded(posterior, generator))
    blocks = directions.split(posterior.engine.sizes, dim=1)
    temperature = posterior.settings.likelihood_temperature
    kind, items = ("batches", [pool]) if is_batch(pool) else kind_of(pool)
    order, batches = in_batches(posterior, kind, items, tokenizer, batch_size)
    means, parts = [], []
    with (
        together(batches, device=posterior.device, runs=posterior.source, row_by_row=True) as team,
        evaluation_mode(posterior.model),
    ):
        for batch in team.batches(batches, "Sampling the pool", progress_bar):
            x = model_inputs(batch)
            if isinstance(x, Mapping):  # a pool may have labels, which do not count
                x = {name: value for name, value in x.items() if name != posterior.label_key}
            readout: Readout = posterior.objective.readout(x, contrasts=True)
            mean, jacobians = predictor.readout_jacobians(x, readout)
            total = mean.new_zeros(*mean.shape, n_samples)
            for J, block in zip(jacobians, blocks, strict=True):
                total += J.flatten(2) @ block.T
            means.append(mean.detach() / temperature)
            parts.append(total.detach() / temperature)
        rows = team.rows(mean=means, deviations=parts)
    if not rows:
        raise ValueError("the pool is empty")
    if order is not None:
        rows = {name: column[order.argsort().to(column.device)] for name, column in rows.items()}
    return JointSamples(rows["mean"], rows["deviations"].permute(2, 0, 1))
