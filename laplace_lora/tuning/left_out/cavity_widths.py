"""Covariances that training examples would have without what they, and companions, taught.

The curvature of an exact posterior is a sum over examples, and that of an example and of those it
shares an input with can be taken out of it again. This takes their joint covariance. Copies have it
in their own; of preference pairs with one text in common the Jacobians are computed once more. All
of this happens in the span of the posterior's curvature: nothing was taught outside of it, also
where a sketch has cut it off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import Readout
from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.dense import DensePrecision
from laplace_lora.tuning.left_out.examples import TrainingExamples
from laplace_lora.tuning.left_out.linear_model import owners_of_sets, without_own
from laplace_lora.tuning.left_out.shared_inputs import Key, SharedInputs
from laplace_lora.tuning.validation.cache import ABOVE, ZERO

BYTES = 2**29  # of roots of companions' joint curvatures; the work takes several times that
FAR = 1e6  # of the curvature's largest eigenvalue: a prior beside which it is nothing


@dataclass
class _Sets:
    """Sets of companions with equally many members, and equally many of them distinct.

    Attributes:
        first: A member of each, ``(sets,)``.
        roots: Roots of all members' curvatures, ``(sets, members k, distinct c)``.
        owners: Examples that are left out with a set: its number, the example, and the example's
            place among the distinct ones.
        keys: The distinct members of each.
    """

    first: list[int] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)
    owners: list[tuple[int, int, int]] = field(default_factory=list)
    keys: list[list[Key]] = field(default_factory=list)


class CavityWidths:
    """Covariances of examples without the curvature of those that are left out with them.

    Iterates over no data. Runs the model once for each preference pair that shares one text. Where
    the roots of related pairs' curvatures take more than `BYTES`, the smallest sets of them are
    left out together; of the others an example's own curvature alone.

    Args:
        predictor: Of a posterior under a scalar prior that `leaves_examples_out`.
        readout: Functions of the outputs.
        root: Roots ``R`` of the examples' curvatures ``Rᵀ R``, ``(N, k, c)``.
        inputs: What the examples are told by.
        companions: See `SharedInputs.companions`.
        team: The processes that share the data.

    Attributes:
        too_many: How many examples have too many companions.
    """

    def __init__(
        self,
        predictor: Predictor,
        readout: Readout,
        root: Tensor,
        inputs: SharedInputs,
        companions: Mapping[int, Sequence[int]],
        team: Together,
    ) -> None:
        self.predictor, self.readout, self.root = predictor, readout, root
        precision = predictor.posterior.precision
        assert isinstance(precision, RowPrecision | DensePrecision)
        self.precision = precision
        self.sets: dict[tuple[int, int], _Sets] = defaultdict(_Sets)
        self.too_many, room = 0, BYTES // root.element_size()
        found = owners_of_sets(companions).items()
        for members, owners in sorted(found, key=lambda item: len(item[0])):
            distinct = list(dict.fromkeys(inputs.keys[i] for i in members))
            if len(distinct) > 1:
                room -= root[0].numel() * len(members) * len(distinct)
                if room < 0:
                    self.too_many += len(owners)
                    continue
            self._add(members, owners, distinct, inputs.keys)
        joint = [sets for (_, distinct), sets in self.sets.items() if distinct > 1]
        used = dict.fromkeys(key for sets in joint for keys in sets.keys for key in keys)
        batches = inputs.inputs_of(list(used), team)
        self._coordinates = {key: self._coordinates_of(batches[key]) for key in used}

    def without(self, marginal: Tensor, delta: float) -> Tensor:
        """Return the covariances without the curvature of each example and its companions.

        Args:
            marginal: Covariances with all curvature, ``(N, c, c)``, as far as it determines them.
            delta: The prior precision that they belong to.
        """
        cavity = without_own(marginal, self.root)
        c = marginal.shape[-1]
        for (_, distinct), sets in self.sets.items():
            is_joint = distinct > 1
            joint = self._joint(sets, delta).to(marginal) if is_joint else marginal[sets.first]
            left = without_own(joint, torch.stack(sets.roots))
            which, examples, at = torch.tensor(sets.owners, device=marginal.device).T
            blocks = left.unflatten(2, (-1, c)).unflatten(1, (-1, c))
            cavity[examples] = blocks[which, at, :, at]
        return cavity

    def _add(
        self, members: Sequence[int], owners: Sequence[int], distinct: list[Key], keys: list[Key]
    ) -> None:
        _, k, c = self.root.shape
        roots = self.root.new_zeros(len(members), k, len(distinct), c)
        for m, i in enumerate(members):
            roots[m, :, distinct.index(keys[i])] = self.root[i]
        sets = self.sets[len(members), len(distinct)]
        sets.owners += [(len(sets.first), i, distinct.index(keys[i])) for i in owners]
        sets.first.append(members[0])
        sets.roots.append(roots.flatten(2).flatten(0, 1))
        sets.keys.append(distinct)

    def _coordinates_of(self, x: object) -> Tensor:
        """Return a Jacobian in the curvature's eigenvectors, ``(c, K)``."""
        _, jacobians = self.predictor.readout_jacobians(x, self.readout)
        return self.precision.coordinates(jacobians)[0]

    def _joint(self, sets: _Sets, delta: float) -> Tensor:
        """Return the sets' joint covariances, ``(sets, distinct c, distinct c)``."""
        shares = 1 / (self.precision.eigenvalues + delta)
        covariances = []
        for keys in sets.keys:
            rows = torch.cat([self._coordinates[key] for key in keys])
            covariances.append((rows * shares) @ rows.T)
        return torch.stack(covariances)


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
