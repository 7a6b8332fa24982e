"""How much memory a fit and a prediction will take, from one example and the sizes of the maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_lora.adapters.packed_weights import tensor_parts
from laplace_lora.data.batches import batch_length, first_examples
from laplace_lora.display.plots import parts_figure
from laplace_lora.display.results import Columns, Result
from laplace_lora.display.tables import terminal_table
from laplace_lora.generation.scoring import scoring_bytes
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.structures import sizes
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.sizes import GIB, MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


@dataclass(frozen=True)
class MemoryEstimate(Result):
    """Bytes beyond the model itself.

    Attributes:
        batch_size: Examples of the batch.
        activations: What one forward pass on the batch keeps for the backward passes.
        curvature: What the posterior holds after the fit: sums, and for Kronecker factors their
            eigenpairs. Inputs that maps share count once a map, so this is an upper bound.
        jacobian: The largest Jacobian of one tensor in a prediction, with its workspace; or what
            scoring a language model's texts holds over the vocabulary, see `score`.
        fit_jacobian: The same of a fit, zero where it needs none; or logits, their softmax and
            their gradients over the vocabulary, with one label drawn for each token.
        available: Free memory of the device.
        advice: What to do if the curvature alone is too large.
    """

    batch_size: int
    activations: int
    curvature: int
    jacobian: int
    fit_jacobian: int
    available: int
    advice: str

    @property
    def fit(self) -> int:
        """Peak of a fit."""
        return self.activations + self.curvature + self.fit_jacobian

    @property
    def predict(self) -> int:
        """Peak of a prediction, with the fitted posterior."""
        return self.activations + self.curvature + self.jacobian

    @property
    def fits(self) -> bool:
        """Whether fit and prediction are expected to fit in memory."""
        return max(self.fit, self.predict) <= self.available

    def __rich__(self) -> RenderableType:
        """Return the same table for a terminal, under a title that fits in a line."""
        return terminal_table(self._table()[0], "Memory beyond the model")

    def plot(self) -> Figure:
        """Draw what fit and prediction take of the free memory.

        Raises:
            ImportError: If matplotlib is missing.
        """
        unit, size = self._unit()
        jacobians = {"fit": self.fit_jacobian, "predict": self.jacobian}
        bars = {
            name: {
                "curvature": self.curvature / size,
                "activations": self.activations / size,
                "derivatives": jacobian / size,
            }
            for name, jacobian in jacobians.items()
        }
        return parts_figure(bars, self.available / size, unit)

    def to_dict(self) -> dict[str, Any]:
        """Return bytes by name, the peaks of fit and prediction, and whether they fit."""
        return {**asdict(self), "fit": self.fit, "predict": self.predict, "fits": self.fits}

    def _unit(self) -> tuple[str, int]:
        """Return a unit in which the peaks have digits before the point, and its bytes."""
        return ("GiB", GIB) if max(self.fit, self.predict) >= GIB else ("MiB", MIB)

    def _table(self) -> tuple[Columns, str, None]:
        unit, size = self._unit()
        names = ("activations", "curvature", "jacobian", "fit", "predict", "available")
        figures = [getattr(self, name) / size for name in names]
        return {"for": names, unit: figures}, str(self), None

    def __str__(self) -> str:
        """Return the figures in GiB, and what to do if they are too large."""
        text = (
            f"batch of {self.batch_size}: fit {self.fit / GIB:.2f} GiB, predict "
            f"{self.predict / GIB:.2f} GiB beyond the model (curvature at most "
            f"{self.curvature / GIB:.2f}, "
            f"activations {self.activations / GIB:.2f}, derivatives {self.jacobian / GIB:.2f}); "
            f"{self.available / GIB:.2f} GiB are free"
        )
        if self.fits:
            return text
        left = self.available - self.curvature
        if left <= 0:
            return f"{text}. The curvature alone is too large: {self.advice}"
        derivatives = max(self.jacobian, self.fit_jacobian)
        size = self.batch_size * left // (self.activations + derivatives)
        advice = (
            f"use batches of {size}" if size >= 1 else "shorten the inputs or cover fewer layers"
        )
        return f"{text}. Not enough memory: {advice}"


def estimate_memory(
    posterior: Posterior, batch: Any, n_examples: int | None = None
) -> MemoryEstimate:
    """Estimate the memory of a fit and a prediction on batches like one.

    Runs the model forward on the batch's first example, or on the whole batch where its tensors do
    not have one row per example.

    Args:
        posterior: A posterior, fitted or not.
        batch: What the model takes.
        n_examples: Examples of the fit, for posteriors that grow with the data.

    Raises:
        TypeError: If it is no batch, such as a loader.
    """
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    if not any(isinstance(value, Tensor) for value in values):
        raise TypeError(
            "estimate_memory takes one batch of tensors, as the model does, got "
            f"{type(batch).__name__}; of a loader next(iter(loader)), of a pair the inputs"
        )
    model, engine, structure = posterior.model, posterior.engine, posterior.structure
    size = batch_length(batch)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        for _, t in tensor_parts("", tensor):
            storage = t.untyped_storage()
            seen = min(t.nbytes, storage.nbytes())  # a view may show a part, or a part many times
            saved[storage.data_ptr()] = max(seen, saved.get(storage.data_ptr(), 0))
        return tensor

    weights = {
        t.untyped_storage().data_ptr()
        for whole in [*model.parameters(), *model.buffers()]
        for _, t in tensor_parts("", whole)
    }
    with (
        evaluation_mode(model),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        splits = posterior.divides(batch)
        logits = model(first_examples(batch, 1) if splits else batch)
    outputs = getattr(model, "predicted_outputs", logits.shape[-1])
    recorded = sum(n for pointer, n in saved.items() if pointer not in weights)
    activations = recorded * size if splits else recorded
    jacobian = 2 * engine.dtype.itemsize * size * outputs * max(engine.sizes)
    fit_jacobian = jacobian if structure.fits_by_jacobians else 0
    if posterior.objective.predicts_tokens:
        _, labels = posterior.split(batch)
        jacobian = max(jacobian, scoring_bytes(labels, logits))
        fit_jacobian += _fit_bytes(posterior, labels, logits)
    columns = posterior.objective.n_columns(outputs)
    examples = n_examples or posterior.state.n_data
    return MemoryEstimate(
        batch_size=size,
        activations=activations,
        curvature=structure.nbytes(engine, examples, columns),
        jacobian=jacobian,
        fit_jacobian=fit_jacobian,
        available=sizes.available(posterior.device),
        advice=structure.advice,
    )


def _fit_bytes(posterior: Posterior, labels: Tensor, logits: Tensor) -> int:
    """Return about how many bytes a language model's fit takes over the vocabulary.

    Args:
        posterior: A language model's.
        labels: The labels that count, ``(texts, tokens)``.
        logits: Of any tokens, ``(k, vocabulary)``; tell size and dtype.
    """
    scored, vocabulary = labels != IGNORED, logits.shape[-1]
    columns = 1
    if not posterior.engine.estimates:  # the exact root: every token has its own
        columns = int(scored.sum(1).max()) * posterior.objective.n_columns(vocabulary)
    return (3 + columns) * int(scored.sum()) * vocabulary * logits.element_size()
