"""`FeaturesWatch`: notice that features are no longer those of a fit.

A Gaussian process has its training data's features in memory. Those of new data must be of the same
transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.configuration import function_settings
from laplace_lora.adapters.frozen_values import frozen_places
from laplace_lora.adapters.plain_names import nameless, plain_names
from laplace_lora.adapters.selection import listed
from laplace_lora.data.sharding import is_sharded_tensor
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.posteriors.changes import changes
from laplace_lora.posteriors.fitted_weights import are_equal
from laplace_lora.posteriors.weights_watch import head_dtype, traces


class FeaturesWatch:
    """Compares a transformer with what it was when this object was made.

    Args:
        source: A `LogitsModel` in evaluation mode or not.
    """

    def __init__(self, source: Any) -> None:
        with in_turn(source):
            # An adapter may be loaded under another name.
            plain, bare = plain_names(source), nameless(source)
            places = frozen_places(source, ())
            self._places = [replace(place, name=bare(place.name)) for place in places]
            in_pieces = (n for n, p in source.named_parameters() if is_sharded_tensor(p))
            # Of tensors in pieces, as of offloaded ones, there are names alone.
            self._values = {bare(plain(name)): torch.zeros(0) for name in in_pieces}
            self._values |= {place.name: place.samples() for place in self._places}
            self._adapter = function_settings(source)
        self._source, self._dtype = source, head_dtype(source)
        self._seen: Any = None

    @property
    def state(self) -> dict[str, Any]:
        """What is compared, but for the dtype, to be kept with a posterior's state."""
        return {"values": self._values, "adapter": self._adapter}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a watch over another transformer, or at other weights.

        Raises:
            ValueError: If tensors, their values or the adapter's scaling are others; names some.
        """
        then, now = state["values"], self._values
        known = [name for name, values in (*then.items(), *now.items()) if len(values)]
        others = [name for name in known if not (name in then and name in now)]
        if others:
            raise ValueError(
                "the state is of another transformer: only one of the two has tensors called "
                f"{listed(list(dict.fromkeys(others)))}; load it into the model of its fit"
            )
        moved, rescaled = changes(self._places, then, self._source, state["adapter"])
        if moved or rescaled:
            names = [place.name for place in moved] + rescaled
            raise ValueError(
                f"the state is of a transformer with other weights, buffers, settings or scalings "
                f"of {listed(names)}; load the base model and the adapter of its fit"
            )

    def check(self) -> None:
        """Refuse another dtype, other weights, buffers and settings, and another scaling.

        Raises:
            RuntimeError: If one has changed; names it.
        """
        now = head_dtype(self._source)
        if now != self._dtype:
            raise RuntimeError(
                f"the last layer is now in {now}, and the posterior was fitted in {self._dtype}. "
                "Fit again or bring the model back"
            )
        with in_turn(self._source):
            self._check()

    def _check(self) -> None:
        seen = traces(t for place in self._places if (t := place.tensor) is not None)
        known = seen == self._seen
        # Written to through ``.data``, a tensor keeps its version.
        looked_at = [
            p for p in self._places if not known or getattr(p.tensor, "requires_grad", True)
        ]
        moved, rescaled = changes(looked_at, self._values, self._source, self._adapter)
        if moved or rescaled:
            names = [place.name for place in moved] + rescaled
            raise RuntimeError(
                f"weights, buffers, settings or scalings of {listed(names)} have changed since the "
                "posterior was fitted, so new features do not go with those of the fit. Fit again, "
                "or bring the model back"
            )
        self._seen = seen


def check_same_head(now: Tensor, then: Tensor) -> None:
    """Refuse the state of a process with another last layer than the model's.

    Raises:
        ValueError: If its dtype or its values are others.
    """
    if then.dtype != now.dtype:
        raise ValueError(
            f"the state is of a last layer in {then.dtype}, and this one is in {now.dtype}; load "
            "it into the model in the dtype of its fit"
        )
    if not are_equal(now, then):
        raise ValueError(
            "the state is of a last layer with other weights, or of other answer tokens; load it "
            "at the weights of its fit"
        )
