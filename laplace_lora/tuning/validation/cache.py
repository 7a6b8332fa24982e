"""One pass over a validation set, kept so that any prior can be scored afterwards.

The logits' covariance is ``Σ_k M_k / (e_k + δ)``; a `ValidationCache` keeps what the products ``M``
come to at a few eigenvalues, see `SpectrumNodes`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import ALONE, Together
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.base import Readout, Scoring, integrated_variables
from laplace_lora.likelihoods.label_check import check_labels
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.multilabel import MISSING
from laplace_lora.linalg.spectrum_nodes import SpectrumNodes
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.base import Functions
from laplace_lora.structures.posterior import Posterior

TUNING_POINTS = 256  # of the quadrature, for hundreds of candidates in turn
EVERY, ZERO, ABOVE = slice(None), slice(0, 1), slice(1, None)  # of a cache's eigenvalues
LARGE = 2**31  # bytes of a cache; joining its batches takes as much again
VALIDATION = "Evaluating validation set"  # title of the progress bar


def scoring_of(
    posterior: Posterior,
    link: str,
    n_samples: int,
    generator: torch.Generator | None = None,
    team: Together = ALONE,
) -> Scoring:
    """Return how a posterior's predictions are scored; everything compared sees the same samples.

    Args:
        posterior: A fitted posterior.
        link: Link approximation, see `Link`.
        n_samples: Samples of the ``"mc"`` link, common to everything compared.
        generator: Source of the samples.
        team: The processes that share the data; all see the main process's samples.
    """
    made = Link(link, points=TUNING_POINTS)
    if link == "mc":
        place: Any = {"dtype": posterior.dtype, "device": posterior.device}
        columns = integrated_variables(posterior.objective, posterior.state.n_outputs)
        noise = torch.randn((n_samples, columns), generator=generator, **place)
        seed = torch.randint(2**62, (1,), generator=generator, device=posterior.device)
        team.share_main([noise, seed])

        @lru_cache
        def draw(contrasts: int) -> Tensor:
            # From a seed, as the processes may meet numbers of choices in different orders.
            source = torch.Generator(posterior.device).manual_seed(int(seed))
            return torch.randn((n_samples, contrasts), generator=source, **place)

        made = Link(link, noise, TUNING_POINTS, draw)
    sigma = float(posterior.settings.sigma_noise.detach())
    return posterior.objective.scoring(made, sigma)


def labelled_batches(
    posterior: Posterior,
    loader: Any,
    team: Together,
    progress_bar: bool | None,
    title: str = VALIDATION,
) -> Iterator[tuple[Any, Tensor]]:
    """Yield each batch of this process, and its labels.

    Raises:
        ValueError: If there is no loader, a batch has no labels, or none of independent ones is
            known.
    """
    if loader is None:
        raise ValueError("tuning on a validation set needs `val_loader`, a DataLoader with labels")
    known: bool | None = None
    for batch in team.batches(loader, title, progress_bar, posterior.by_example):
        x, y = posterior.split(batch)
        if posterior.objective.has_independent_labels:
            known = known or bool((y != MISSING).any())
        yield x, y
    if posterior.objective.has_independent_labels:
        reports = team.all_of(known)
        if False in reports and True not in reports:
            raise ValueError("no label of the data is known: all are -100 or NaN")


def validation_rows(team: Together, **columns: list[Tensor]) -> dict[str, Tensor]:
    """Return the rows of all processes, see `Together.rows`.

    Raises:
        ValueError: If there are none.
    """
    rows = team.rows(**columns)
    if not rows:
        raise ValueError(
            "there are no examples: the loader is empty, or a stream that can be read only once "
            "has been read"
        )
    return rows


def validation_pass(
    predictor: Predictor,
    loader: Any,
    team: Together,
    readout: Readout,
    functions: Functions,
    progress_bar: bool | None,
    watch: Callable[[Any, Tensor], None] | None = None,
    title: str = VALIDATION,
) -> Iterator[tuple[Tensor, Tensor, Iterator[tuple[int, Tensor]]]]:
    """Yield functions of the outputs, labels and forms of each batch, see `Predictor.forms`.

    Raises:
        ValueError: If there is no loader, a batch has no labels, or see `check_labels`.
        FloatingPointError: If their loss is not finite.
    """
    for x, y in labelled_batches(predictor.posterior, loader, team, progress_bar, title):
        if watch is not None:
            watch(x, y)
        mean, forms = predictor.forms(x, readout, functions)
        check_labels(predictor.posterior.objective, mean, y, readout)
        yield mean, y, forms


class ValidationCache:
    """Moments of a validation set as a function of factors ``a`` on the groups' prior precisions.

    Eigenvalues (relative to the prior of their tensor) are shared out between fixed ones, so that a
    covariance is exact to 1e-5, and its memory does not grow with the number of parameters.

    Args:
        predictor: Of a fitted posterior.
        loader: Validation batches with labels.
        groups: Group of each trainable tensor, ``(tensors,)``.
        readout: Functions of the outputs that are scored.
        progress_bar: Whether to show progress, see `progress`.
        watch: Called with what the model takes and the labels of each batch.
        team: The processes that share the loader.
        title: Of the progress bar.

    Attributes:
        mean: Mean logits, ``(examples, outputs)``.
        y: Labels or targets.
        values: Relative eigenvalues, ``(nodes,)``.
        products: What they carry, ``(examples, pairs of outputs, nodes)`` for each group.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """

    def __init__(
        self,
        predictor: Predictor,
        loader: Any,
        groups: Tensor,
        readout: Readout,
        progress_bar: bool | None = None,
        watch: Callable[[Any, Tensor], None] | None = None,
        team: Together = ALONE,
        title: str = VALIDATION,
    ) -> None:
        posterior = predictor.posterior
        prior = posterior.prior_by_tensor.tolist()
        group_of = groups.tolist()
        spectra = zip(posterior.precision.spectra(), prior, strict=True)
        nodes = SpectrumNodes.covering(e / delta for s, delta in spectra for e, times in s if times)

        def shares(i: int, e: Tensor) -> Tensor:
            return nodes.shares(e / prior[i]) / prior[i]

        means, labels, taken = [], [], 0
        stored: list[list[Tensor]] = [[] for _ in range(max(group_of) + 1)]
        options = (readout, shares, progress_bar, watch, title)
        for mean, y, forms in validation_pass(predictor, loader, team, *options):
            pairs = _pairs(mean)
            sums: list[Any] = [0.0] * len(stored)
            for i, form in forms:
                sums[group_of[i]] = sums[group_of[i]] + form
            means.append(mean)
            labels.append(y)
            for group, total in zip(stored, sums, strict=True):
                group.append(total[:, pairs[0], pairs[1]])
            had, taken = taken, taken + sum(group[-1].nbytes for group in stored)
            if had <= LARGE < taken:
                _announce_size(mean, sum(map(len, means)), taken)
        products = {f"products{i}": group for i, group in enumerate(stored)}
        rows = validation_rows(team, mean=means, y=labels, **products)
        self.mean, self.y = rows["mean"], rows["y"]
        self.products = [rows[name] for name in products]
        self.values = nodes.values.to(self.mean)

    def some(self, which: Tensor) -> ValidationCache:
        """Return the moments of some of the rows, by their places."""
        part = copy.copy(self)
        part.mean, part.y = self.mean[which], self.y[which]
        part.products = [products[which] for products in self.products]
        return part

    def covariance(self, factors: Tensor, nodes: slice = EVERY) -> Tensor:
        """Return the covariance with each group's prior precision multiplied by a factor.

        Args:
            factors: Shape ``(groups,)``; gradients flow through it.
            nodes: Which of the eigenvalues count, `ZERO` or those `ABOVE` it.

        Returns:
            Shape ``(examples, outputs, outputs)``.
        """
        parts = [
            products[..., nodes] @ (1 / (self.values[nodes] + factor))
            for products, factor in zip(self.products, factors, strict=True)
        ]
        pairs, total = _pairs(self.mean), torch.stack(parts).sum(0)
        square = total.new_zeros(*self.mean.shape, self.mean.shape[1])
        square[:, pairs[0], pairs[1]] = total
        square[:, pairs[1], pairs[0]] = total
        return square


def _announce_size(mean: Tensor, rows: int, taken: int) -> None:
    columns = mean.shape[1]
    warn(
        f"the validation set takes {taken / 2**30:.1f} GiB after {rows} rows, as every pair of "
        f"{columns} functions of the outputs has covariances; joining the batches takes as much "
        "again, and each step scores all of them. Give fewer rows if memory or time runs out: of "
        "more than 4096 calibrate searches only so many"
    )


def _pairs(mean: Tensor) -> Tensor:
    """Return the pairs of columns of which a covariance is, ``(2, pairs)``."""
    columns = mean.shape[1]
    return torch.triu_indices(columns, columns, device=mean.device)
