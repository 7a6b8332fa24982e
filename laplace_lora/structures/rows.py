"""`GramPosterior`: what posteriors with a precision ``c Zᵀ Z + D`` over all weights share.

Prior, evidence, predictions and samples from the rows ``Z`` of one `RowStorage`, through the
eigenpairs of their Gram matrix. Where the rows come from belongs to `data_space` and `low_rank`,
the algebra to `row_precision`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_lora.linalg.row_precision import RowPrecision, gram_matrix, group_grams
from laplace_lora.linalg.row_storage import RowStorage
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.posteriors.base import LoraPosterior
from laplace_lora.predictive.glm import Gram
from laplace_lora.tuning.coupled_cache import CoupledCache
from laplace_lora.tuning.evidence import Spectrum, optimal_joint_precision
from laplace_lora.tuning.groups import Structure, prior_groups


class GramPosterior(LoraPosterior):
    """Posterior with correlations between all weights, of every tensor with every other.

    The prior may be a scalar, one precision a tensor, or one a weight. The Gram matrix and its
    eigenpairs are kept for one ratio between the tensors' precisions: a scalar prior needs them
    once, another takes one pass over the rows, without the model, when it is first used.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"`` or ``"regression"``.
        **kwargs: Arguments of `LoraPosterior`.
    """

    H: RowStorage | None
    _eigen: tuple[Tensor, Tensor, Tensor] | None = None

    def _init_H(self) -> None:
        self.H = None

    @property
    def posterior_precision(self) -> RowPrecision:
        """The posterior precision, never formed: see `RowPrecision`."""
        delta, pattern = self._split_prior()
        values, vectors = self._eigenpairs(pattern)
        parts = self._by_tensor(pattern)
        scale = float(self._H_factor)
        return RowPrecision(self.rows, parts, values, vectors, scale, float(delta))

    @property
    def posterior_covariance(self) -> Tensor:
        """Dense posterior covariance, ``(parameters, parameters)``; for small models."""
        return self.posterior_precision.to_matrix(-1)

    @property
    def rows(self) -> RowStorage:
        """Rows ``Z`` of which ``Zᵀ Z`` is the curvature of the summed loss.

        Raises:
            AttributeError: If the posterior has not been fitted.
        """
        self._check_H_init()
        assert self.H is not None
        return self.H

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P − log det P₀`` of the evidence, a float64 scalar."""
        prior, scale = self.prior_precision.double(), self._H_factor.double()
        if len(prior) == 1 or not prior.requires_grad:
            values, _ = self._eigenpairs(self._split_prior()[1])
            return torch.log1p(scale * values / prior[0]).sum()
        gram = scale * gram_matrix(self.rows, self._by_tensor(prior))
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return 2 * torch.linalg.cholesky(eye + gram).diagonal().log().sum()

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """``log det P``, a float64 scalar."""
        return self.log_det_ratio + self.prior_precision_diag.double().log().sum()

    def square_norm(self, value: Tensor) -> Tensor:
        """Return ``(θ − θ_MAP)ᵀ P (θ − θ_MAP)`` of a weight vector, a scalar."""
        gap = value - self.mean
        return gap @ self.posterior_precision.multiply(gap.unsqueeze(0))[0]

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return ``J P⁻¹ Jᵀ`` for ``J`` of shape ``(batch, outputs, parameters)``."""
        return self.posterior_precision.inverse_form(Js.split(self.rows.sizes, dim=-1))

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return ``J P⁻¹ Jᵀ`` between all examples, ``(batch · outputs,)`` squared."""
        return self.functional_variance(Js.flatten(0, 1).unsqueeze(0)).squeeze(0)

    @torch.no_grad()
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Return samples of the weights, ``(n_samples, parameters)``."""
        size = (n_samples, self.n_params)
        noise = torch.randn(size, dtype=self._dtype, device=self._device, generator=generator)
        return self.mean + self.posterior_precision.root_multiply(noise)

    @torch.no_grad()
    def weight_variance(self) -> Tensor:
        """Return the diagonal of the posterior covariance, ``(parameters,)``."""
        return self.posterior_precision.diag(-1)

    def gram_blocks(self, x: Any) -> tuple[Tensor, Iterator[tuple[int, list[Gram]]]]:
        """Return mean logits, and their covariance as a function of the prior, in one block.

        All precisions change in proportion; ``δ`` is that of the first tensor.
        """
        precision = self.posterior_precision
        with evaluation_mode(self.model):
            mean, jacobians = self.backend.jacobian_blocks(x)
        return mean, iter([(0, precision.grams(jacobians))])

    def block_spectra(self) -> list[Spectrum]:
        """Return the whole matrix's eigenvalues with the first tensor, none with the others."""
        precision = self.posterior_precision
        none = precision.eigenvalues.new_zeros(1)
        spectrum = [(precision.eigenvalues, 1)]
        if precision.multiplicity:
            spectrum.append((none, precision.multiplicity))
        return [spectrum] + [[(none, 0)]] * (self.n_layers - 1)

    def validation_cache(
        self, loader: DataLoader | None, groups: Tensor, progress_bar: bool
    ) -> Any:
        """Return what a validation set says about any prior."""
        if int(groups.max()) == 0:
            return super().validation_cache(loader, groups, progress_bar)
        return CoupledCache(self, loader, groups, progress_bar)

    def to(self, device: torch.device | str) -> GramPosterior:
        """Move model and posterior to a device, in place, and return the posterior."""
        super().to(device)
        if self.H is not None:
            self.H = self.H.to(device)
        self._eigen = None
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return laplace-torch's state, the curvature as tensors."""
        return {**super().state_dict(), "H": self._packed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a posterior of the same class over the same weights."""
        curvature = self._unpacked(*state_dict["H"])
        super().load_state_dict(state_dict)
        self._install(curvature)

    def _checked_rows(self, i: int, block: Tensor) -> Tensor:
        """Return a batch's rows of one tensor, ``(rows, numbers)``, if they are finite."""
        if not bool(block.isfinite().all()):
            raise FloatingPointError(f"the curvature of {self.block_names[i]!r} is not finite")
        return block.flatten(2).flatten(0, 1)

    def _unpack(self, tensors: Any, description: Any) -> None:
        self._install(self._unpacked(tensors, description))

    def _unpacked(self, tensors: Any, description: Any) -> Any:
        """Return the curvature that was packed; raise ValueError or KeyError if it cannot be."""
        raise NotImplementedError

    def covariance_of(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J P⁻¹ Jᵀ``, ``(batch, outputs, outputs)``, before ``covariance_scale``."""
        return self.posterior_precision.inverse_form(jacobians)

    def _split_prior(self) -> tuple[Tensor, Tensor]:
        """Return the first prior precision, and all of them in units of it."""
        prior = self.prior_precision.detach().double()
        return prior[0], prior / prior[0]

    def _by_tensor(self, values: Tensor) -> list[Tensor]:
        """Split one value for all, one a tensor or one a weight into the tensors' parts."""
        if len(values) == 1:
            return [values[0]] * self.n_layers
        per_weight = len(values) == self.n_params
        return list(values.split(self.rows.sizes) if per_weight else values.unbind())

    @torch.no_grad()
    def _eigenpairs(self, pattern: Tensor) -> tuple[Tensor, Tensor]:
        """Return eigenpairs of ``Z R⁻¹ Zᵀ``, without those at the level of rounding errors."""
        kept = self._eigen
        tolerance = 4 * torch.finfo(self._dtype).eps
        # A prior that was only scaled has the same pattern, up to rounding.
        if (
            kept is not None
            and kept[0].shape == pattern.shape
            and torch.allclose(kept[0], pattern, rtol=tolerance, atol=0)
        ):
            return kept[1], kept[2]
        gram = gram_matrix(self.rows, self._by_tensor(pattern))
        values, vectors = torch.linalg.eigh(gram)
        real = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        values, vectors = values[real].flip(0), vectors[:, real].flip(1)
        # No more directions than weights, where rows outnumber them.
        self._eigen = (pattern, values[: self.n_params], vectors[:, : self.n_params])
        return self._eigen[1:]

    def _maximise_evidence(
        self,
        structure: Structure,
        tune_sigma_noise: bool,
        val_loader: DataLoader | None,
        kwargs: dict[str, Any],
    ) -> None:
        coupled = False
        if not kwargs and structure != "diag":
            groups = prior_groups(self.block_names, structure)
            coupled = int(groups.max()) > 0
            # The scalar's eigenvalues are needed, for the maximum or as the start of a climb.
            self.prior_precision = float(self.prior_precision[0].detach())
            structure = "scalar"
        with_noise = coupled and tune_sigma_noise and self.likelihood == "regression"
        super()._maximise_evidence(
            structure, tune_sigma_noise and not with_noise, val_loader, kwargs
        )
        if not coupled:
            return
        count = int(groups.max()) + 1
        ones = [torch.ones((), dtype=torch.float64)] * self.n_layers
        squares = self._squared_norms()
        precisions, noise = optimal_joint_precision(
            group_grams(self.rows, ones, groups.tolist()),
            squares.new_zeros(count).index_add_(0, groups.to(squares.device), squares),
            float(self.prior_precision),
            float(self.sigma_noise.detach()),
            1 / self.temperature,
            (self.loss, self.n_data * self.n_outputs) if with_noise else None,
        )
        if with_noise:
            self.sigma_noise = noise
        self._set_precisions(precisions.to(self._device)[groups.to(self._device)], groups)

    def _search_grid(self, *args: Any, **kwargs: Any) -> None:
        self.prior_precision = float(self.prior_precision[0].detach())  # the grid's are scalars
        super()._search_grid(*args, **kwargs)
