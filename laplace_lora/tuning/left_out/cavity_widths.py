"""`CavityWidths`: covariances that examples would have without what they, and companions, taught.

The curvature of an exact posterior is a sum over examples, and that of an example and of those it
shares an input with can be taken out of it again. This takes their joint covariance. Copies have it
in their own; of preference pairs with one text in common the Jacobians are computed once more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import Readout
from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.dense import DensePrecision
from laplace_lora.tuning.left_out.linear_model import owners_of_sets, without_own
from laplace_lora.tuning.left_out.shared_inputs import Key, SharedInputs

BYTES = 2**31  # of Jacobians held at a time


@dataclass
class _Sets:
    """Sets of companions with equally many members, and equally many of them distinct.

    Attributes:
        first: A member of each, ``(sets,)``.
        roots: Roots of all members' curvatures, ``(sets, members k, distinct c)``.
        owners: Examples that are left out with a set: its number, the example, and the example's
            place among the distinct ones.
        keys: The distinct members of each.
        prior: ``J Jᵀ`` of the distinct members, ``(sets, distinct c, distinct c)`` in float64,
            where there are several.
    """

    first: list[int] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)
    owners: list[tuple[int, int, int]] = field(default_factory=list)
    keys: list[list[Key]] = field(default_factory=list)
    prior: list[Tensor] = field(default_factory=list)


class CavityWidths:
    """Covariances of examples without the curvature of those that are left out with them.

    Iterates over no data. Runs the model once for each preference pair that shares one text, or
    again where the Jacobians of related pairs take more than `BYTES`; where those of one set do,
    only an example's own curvature is left out.

    Args:
        predictor: Of a posterior under a scalar prior that `leaves_examples_out`.
        readout: Functions of the outputs.
        root: Roots ``R`` of the examples' curvatures ``Rᵀ R``, ``(N, k, c)``.
        inputs: What the examples are told by.
        companions: See `SharedInputs.companions`.
        team: The processes that share the data.

    Attributes:
        too_many: How many examples have companions whose Jacobians take too much.
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
        self.too_many = 0
        sizes = predictor.posterior.engine.sizes
        affordable = BYTES // (root.shape[2] * sum(sizes) * root.element_size())
        self.sets: dict[tuple[int, int], _Sets] = defaultdict(_Sets)
        for members, owners in owners_of_sets(companions).items():
            distinct = list(dict.fromkeys(inputs.keys[i] for i in members))
            if len(distinct) > 1 and affordable < len(distinct):
                self.too_many += len(owners)
                continue
            self._add(members, owners, distinct, inputs.keys)
        self._unit: dict[Key, Tensor] = {}
        self._measure(inputs, team, affordable)

    def without(self, marginal: Tensor, delta: float) -> Tensor:
        """Return the covariances without the curvature of each example and its companions.

        Args:
            marginal: Covariances with all curvature, ``(N, c, c)``.
            delta: The prior precision that they belong to.
        """
        cavity = without_own(marginal, self.root)
        c = marginal.shape[-1]
        for sets in self.sets.values():
            joint = self._joint(sets, delta).to(marginal) if sets.prior else marginal[sets.first]
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

    def _measure(self, inputs: SharedInputs, team: Together, affordable: int) -> None:
        """Compute the Jacobians of distinct members, and keep what their covariances need."""
        joint = [sets for (_, distinct), sets in self.sets.items() if distinct > 1]
        uses = Counter(key for sets in joint for keys in sets.keys for key in keys)
        batches = inputs.inputs_of(list(uses), team)
        held: dict[Key, Tensor] = {}
        for sets in joint:
            for keys in sets.keys:
                for key in keys:
                    if key not in held:
                        if len(held) >= affordable:
                            held = {k: J for k, J in held.items() if k in keys}
                        held[key] = self._jacobian(key, batches[key])
                rows = torch.cat([held[key] for key in keys]).double()
                sets.prior.append(rows @ rows.T)
                uses.subtract(keys)
                held = {key: J for key, J in held.items() if uses[key]}

    def _jacobian(self, key: Key, x: object) -> Tensor:
        """Return a Jacobian ``(c, parameters)``, and keep its part in the span of the data's."""
        _, jacobians = self.predictor.readout_jacobians(x, self.readout)
        blocks = list(jacobians)
        if key not in self._unit:
            self._unit[key] = self.precision.coordinates(blocks)[0]
        return torch.cat([block[0].flatten(1) for block in blocks], dim=1)

    def _joint(self, sets: _Sets, delta: float) -> Tensor:
        """Return the sets' joint covariances, ``(sets, distinct c, distinct c)``."""
        shares = 1 / (self.precision.eigenvalues + delta)
        covariances = []
        for keys, prior in zip(sets.keys, sets.prior, strict=True):
            unit = torch.cat([self._unit[key] for key in keys])
            outside = (prior - unit @ unit.T) / delta
            covariances.append((unit * shares) @ unit.T + outside)
        return torch.stack(covariances)
