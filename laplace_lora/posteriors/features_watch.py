"""`FeaturesWatch`: notice that features are no longer those of a fit.

A Gaussian process has its training data's features in memory. Those of new data must be of the same
transformer.
"""

from __future__ import annotations

from typing import Any

from laplace_lora.adapters.frozen_values import frozen_places
from laplace_lora.adapters.peft_state import adapter_settings
from laplace_lora.adapters.selection import listed
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.posteriors.weights_watch import changes, head_dtype, traces


class FeaturesWatch:
    """Compares a transformer with what it was when this object was made.

    Args:
        source: A `LogitsModel` in evaluation mode or not.
    """

    def __init__(self, source: Any) -> None:
        with in_turn(source):
            self._places = frozen_places(source, ())
            self._values = {place.name: place.samples() for place in self._places}
            self._adapter = adapter_settings(source)
        self._source, self._dtype = source, head_dtype(source)
        self._seen: Any = None

    def check(self) -> None:
        """Refuse another dtype, other weights and buffers, and another scaling of the adapter.

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
                f"weights, buffers or scalings of {listed(names)} have changed since the posterior "
                "was fitted, so new features do not go with those of the fit. Fit again, or bring "
                "the model back"
            )
        self._seen = seen
