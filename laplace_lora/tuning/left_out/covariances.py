"""The covariances of training examples' functions that their own labels have not narrowed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.tuning.left_out.cavity_widths import CavityWidths
from laplace_lora.tuning.left_out.examples import TrainingExamples
from laplace_lora.tuning.validation.cache import ABOVE, ZERO

FAR = 1e6  # of the curvature's largest eigenvalue: a prior beside which it is nothing


class Covariances:
    """Covariances of the examples' functions under any precision, without what each has taught.

    Attributes:
        too_many: See `CavityWidths`.
    """

    def __init__(self, examples: TrainingExamples, team: Together) -> None:
        self.cache, self.predictor = examples.cache, examples.predictor
        self.first_precision = float(examples.first_precision)
        self.too_many = 0
        self._without: Callable[[Tensor, float], Tensor] = lambda covariance, _: covariance
        if self.predictor.posterior.leaves_examples_out:
            together = examples.left_out_together if examples.rivals is None else {}
            known = (examples.readout, examples.own_root(), examples.inputs, together, team)
            widths = CavityWidths(self.predictor, *known)
            self.too_many, self._without = widths.too_many, widths.without

    @property
    def largest_under_prior(self) -> float:
        """The largest variance of a function under a prior precision of 1, without any data."""
        far = FAR * max(float(self.cache.values.max()), 1.0)
        covariance = self.cache.covariance(self.cache.mean.new_tensor([far]))
        variances = covariance.diagonal(dim1=1, dim2=2)
        return float(variances.max()) * far * self.first_precision

    def __call__(self, precision: float) -> Tensor:
        """Return the covariances under a prior precision, ``(N, c, c)``."""
        factor = self.cache.mean.new_tensor([precision / self.first_precision])
        undetermined = self.cache.covariance(factor, ZERO)
        return undetermined + self._without(self.cache.covariance(factor, ABOVE), precision)
