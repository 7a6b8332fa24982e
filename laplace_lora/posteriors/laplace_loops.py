"""`LaplaceLoops`: laplace-torch's own tunings, where arguments of theirs are given."""

from __future__ import annotations

import warnings
from typing import Any

from laplace_lora.data.distributed import is_sharded
from laplace_lora.posteriors.calibrated import CalibratedLaplace
from laplace_lora.tuning.groups import Structure


class LaplaceLoops(CalibratedLaplace):
    """Calls laplace-torch's Adam and its grid of sampled weights; they write while they search."""

    def _laplace_marglik(self, structure: Structure, kwargs: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            # laplace-torch speaks of links, which evidence does not involve.
            warnings.filterwarnings("ignore", "By default `link_approx`", UserWarning)
            super().optimize_prior_precision("glm", "marglik", prior_structure=structure, **kwargs)

    def _laplace_grid(self, val_loader: Any, n_samples: int, kwargs: dict[str, Any]) -> None:
        if is_sharded(val_loader):
            raise ValueError(
                "a grid search by sampled weights (pred_type='nn') takes data that every process "
                "has whole; use pred_type='glm', whose data processes may share"
            )
        if self.fitted.objective.has_independent_labels:
            raise ValueError(
                "a grid search by sampled weights (pred_type='nn') is laplace-torch's, which knows "
                "no independent labels; use pred_type='glm'"
            )
        by_example = self.fitted.by_example
        data = val_loader if val_loader is None else list(map(by_example, val_loader))
        options = {"val_loader": data, "n_samples": n_samples, "link_approx": "mc"}
        super().optimize_prior_precision("nn", "gridsearch", **options, **kwargs)
