"""`Predictor`: predictions of a fitted posterior, linearised (GLM) or from sampled weights.

The GLM predictive is ``f ~ N(f_MAP, J P⁻¹ Jᵀ)`` from one forward pass, put together tensor by
tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.pairs import is_pair
from laplace_lora.likelihoods.base import OUTPUTS, Readout
from laplace_lora.likelihoods.links import Link, gaussian_samples
from laplace_lora.likelihoods.reward_modeling import DIFFERENCE, NO_PAIRS
from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.predictive.linear_samples import (
    SAMPLED,
    LinearSamples,
    SampledOrExact,
    takes_samples,
)
from laplace_lora.predictive.query import NETWORKS, Query
from laplace_lora.predictive.weight_sampling import sampled_outputs
from laplace_lora.structures.base import Functions
from laplace_lora.structures.posterior import Posterior, check_generator, check_no_gradient


class Predictor:
    """Predictions of a posterior."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def __call__(self, x: Any, query: Query) -> Tensor | tuple[Tensor, Tensor]:
        """Return the posterior predictive of a batch, see `LoraLaplace.__call__`."""
        if query.pred_type not in ("glm", "nn"):
            raise ValueError(f"pred_type must be 'glm' or 'nn', got {query.pred_type!r}")
        link = Link(query.link_approx)  # refuses an unknown one
        is_nn = query.pred_type == "nn"
        if query.method == SAMPLED and (is_nn or query.joint or query.diagonal_output):
            raise ValueError(
                "method='sampled' samples the linearised logits of each example as they are; "
                "pred_type='nn', joint and diagonal_output need method='exact'"
            )
        samples = None
        options = (query.method, query.link_approx, query.n_samples, query.generator)
        if takes_samples(self.posterior, *options) and not is_nn and not query.diagonal_output:
            samples = LinearSamples(self.posterior, query.n_samples, query.generator)
        if query.fitting and self.posterior.objective.has_pairs:
            x = self._pairs(x)
        # Ignoring covariances between outputs is a question about the logits themselves.
        contrasts = link.sees_contrasts and not query.diagonal_output and not is_nn
        readout = self.posterior.objective.readout(x, pairs=query.fitting, contrasts=contrasts)
        if is_nn:
            return self._of_networks(x, readout, query)
        answer = SampledOrExact(samples, query.method)
        return answer(
            lambda samples: samples.probabilities(x, readout),
            lambda: self._exact(x, readout, query),
        )

    def distribution(
        self, x: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of a batch's outputs.

        Args:
            x: Batch that the model takes.
            joint: Between all examples of the batch.
            diagonal_output: Variances only; has no effect if joint.

        Returns:
            ``(batch, outputs)`` and ``(batch, outputs, outputs)``, or the latter's diagonal; if
            joint ``(batch · outputs,)`` and its square.
        """
        mean, covariance = self.readout_moments(x, OUTPUTS, joint)
        if joint:
            return mean.flatten(), covariance.squeeze(0)
        return mean, covariance.diagonal(dim1=-2, dim2=-1) if diagonal_output else covariance

    def readout_moments(
        self, x: Any, readout: Readout, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of functions of a batch's outputs.

        Args:
            x: Batch that the model takes.
            readout: The functions.
            joint: Between all examples of the batch.

        Returns:
            Mean ``(batch, columns)``, and ``(batch, columns, columns)``; if joint ``(1, batch ·
            columns, batch · columns)``.
        """
        posterior = self.posterior
        if posterior.differentiable:
            mean, covariance = self._differentiable_moments(x, readout, joint)
        else:
            with evaluation_mode(posterior.model):  # Jacobians are computed as they are consumed
                mean, jacobians = self._linearised(x, readout)
                rows = (J.flatten(0, 1)[None] if joint else J for J in jacobians)
                covariance = posterior.precision.covariance(rows)
        return posterior.settings.calibrated(mean, covariance.to(mean.dtype))

    def reward_difference(self, pairs: Any) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the rewards' difference, see `LoraLaplace`."""
        mean, covariance = self.readout_moments(self._pairs(pairs), DIFFERENCE)
        return mean.squeeze(-1), covariance.flatten()

    def _pairs(self, batch: Any) -> Any:
        """Return a batch that is about pairs in the form with suffixes, see `as_pairs`."""
        if is_pair(batch):
            return batch
        if not self.posterior.objective.has_pairs:
            raise ValueError(NO_PAIRS)
        return self.posterior.by_example(batch)

    def forms(
        self, x: Any, readout: Readout, functions: Functions
    ) -> tuple[Tensor, Iterator[tuple[int, Tensor]]]:
        """Return functions of the outputs, and their covariance under any prior.

        One pass serves every prior precision, see `Precision`; ``covariance_scale`` is left out.

        Args:
            x: Batch that the model takes.
            readout: The functions of the outputs.
            functions: Those of the curvature's eigenvalues.

        Returns:
            Mean ``(batch, columns)``, and an iterator over tensors' indices and forms ``(batch,
            columns, columns, functions)``.
        """
        mean, jacobians = self.readout_jacobians(x, readout)
        forms = self.posterior.precision.forms(jacobians, functions)
        return mean, ((i, form.to(mean.dtype)) for i, form in forms)

    def readout_jacobians(self, x: Any, readout: Readout) -> tuple[Tensor, Iterable[Tensor]]:
        """Return functions of the outputs, ``(batch, columns)``, and their Jacobians by tensor.

        Those of a recentred posterior are the linearised model's at its mean.
        """
        with evaluation_mode(self.posterior.model):
            mean, jacobians = self._linearised(x, readout)
            moves = self.posterior.settings.shift is not None
            return mean, list(jacobians) if moves else jacobians

    def _linearised(self, x: Any, readout: Readout) -> tuple[Tensor, Iterator[Tensor]]:
        """Return what `readout_jacobians` does, the mean still moving while these are consumed.

        The Jacobians of all tensors at once would be most of a prediction's memory.
        """
        engine, shift = self.posterior.engine, self.posterior.settings.shift
        f, jacobians = engine.jacobian_blocks(x, readout.columns)
        mean = self._precise(readout.mean(f))
        if shift is None:
            return mean, jacobians
        mean = mean.clone()
        shares = shift.split(engine.sizes)

        def moving() -> Iterator[Tensor]:
            for J, share in zip(jacobians, shares, strict=True):
                mean.add_(J.flatten(2) @ share)
                yield J

        return mean, moving()

    def _precise(self, mean: Tensor) -> Tensor:
        """Return a mean in the wider of its own dtype and the posterior's."""
        return mean.to(torch.promote_types(mean.dtype, self.posterior.dtype))

    def unmoved_mean(self, x: Any, readout: Readout) -> Tensor:
        """Return functions of the outputs at the MAP weights, ``(batch, columns)``."""
        with torch.no_grad(), evaluation_mode(self.posterior.model), as_called():
            return self._precise(readout.mean(self.posterior.model(x)))

    def output_samples(
        self,
        mean: Tensor,
        covariance: Tensor,
        n_samples: int,
        diagonal_output: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Return samples of Gaussian outputs, ``(n_samples, batch, outputs)``."""
        noise = self._noise(n_samples, mean, generator)
        if diagonal_output:
            return mean + covariance.diagonal(dim1=1, dim2=2).sqrt() * noise.unsqueeze(1)
        return gaussian_samples(mean, covariance, noise)

    def _of_networks(
        self, x: Any, readout: Readout, query: Query
    ) -> Tensor | tuple[Tensor, Tensor]:
        if readout.is_softmax and query.link_approx != "mc":
            raise ValueError("pred_type='nn' samples weights; choose link_approx='mc'")
        count = query.samples(NETWORKS)
        if count < 2 and not readout.is_softmax:
            raise ValueError("a variance needs n_samples of 2 or more")
        outputs = sampled_outputs(self.posterior, x, count, query.generator)
        if readout.is_softmax:
            return readout.under(outputs).mean(0)
        return outputs.mean(0), outputs.var(0)

    def _exact(self, x: Any, readout: Readout, query: Query) -> Tensor | tuple[Tensor, Tensor]:
        if not readout.is_softmax:
            return self.distribution(x, query.joint, query.diagonal_output)
        moments = self.readout_moments(x, readout)
        mean, covariance, relative = readout.of_softmax(*moments)
        noise = None
        if query.link_approx == "mc":
            contrasts = mean if relative else mean[:, 1:]
            noise = self._noise(query.samples(NETWORKS), contrasts, query.generator)
        link = Link(query.link_approx, noise)
        if query.diagonal_output and link.sees_contrasts:
            covariance = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
        return readout.shown(link.log_probabilities(mean, covariance, relative).exp())

    @torch.enable_grad()
    def _differentiable_moments(
        self, x: Any, readout: Readout, joint: bool
    ) -> tuple[Tensor, Tensor]:
        posterior = self.posterior
        check_no_gradient(posterior)
        with evaluation_mode(posterior.model):
            f, jacobians = posterior.engine.differentiable_jacobians(x)
            if readout.columns is not None:
                columns = readout.columns(f.detach())
                jacobians = torch.einsum("rnc,ncp->nrp", columns, jacobians)
            mean, shift = self._precise(readout.mean(f)), posterior.settings.shift
            if shift is not None:
                mean = mean + jacobians @ shift
            rows = jacobians.flatten(0, 1)[None] if joint else jacobians
            parts = rows.split(posterior.engine.sizes, dim=-1)
            return mean, posterior.precision.covariance(parts)

    def _noise(self, n_samples: int, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        check_generator(generator, mean.device)
        size = (n_samples, mean.shape[-1])
        return torch.randn(size, dtype=mean.dtype, device=mean.device, generator=generator)
