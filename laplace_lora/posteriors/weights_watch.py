"""`WeightsWatch`: notice that a model is no longer at the weights where a posterior was fitted.

The weights that it does not cover among them, and the buffers: a forward pass in training mode
moves running statistics, frozen weights or not. And the adapter's scaling, its settings and the
base model's, which are in no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.configuration import (
    OF_CONFIGURATION,
    configurations_of,
    configured,
    settings_of,
)
from laplace_lora.adapters.frozen_values import PackedPlace, TensorPlace, frozen_places
from laplace_lora.adapters.in_use import check_runs
from laplace_lora.adapters.layer_settings import scalings, tuner_layers
from laplace_lora.adapters.model_settings import (
    OF_MODEL,
    Holders,
    config_holders,
    held_settings,
)
from laplace_lora.adapters.packed_weights import parts_here
from laplace_lora.adapters.peft_state import adapter_parameters
from laplace_lora.adapters.plain_names import active_adapters
from laplace_lora.adapters.selection import listed
from laplace_lora.data.sharding import is_sharded_tensor, whole
from laplace_lora.display.warning import warn
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.posteriors.changes import changes
from laplace_lora.posteriors.fitted_weights import (
    are_equal,
    are_held,
    pairs_of,
    rounding_of,
)
from laplace_lora.structures.posterior import Posterior


class WeightsWatch:
    """Compares a model with that of a fit whenever one of its tensors or factors has changed."""

    def __init__(self) -> None:
        self._seen: Any = None
        self._model: nn.Module | None = None
        self._places: list[TensorPlace] = []
        self._counting: list[nn.Module] = []
        self._layers: list[nn.Module] = []
        self._configured: list[nn.Module] = []
        self._of_model: Holders = []
        self._active: set[str] = set()
        self._beside: list[TensorPlace] = []
        self._beside_values = torch.zeros(0)
        self._said_of: Tensor | None = None  # weights of a fit that are rounded in the model

    def look_again(self) -> None:
        """Compare all values at the next check, those of frozen weights among them.

        Between such checks a frozen weight that is written to through ``.data`` goes unnoticed.
        """
        self._seen = None
        self._model = None  # a layer may have been exchanged

    def check(self, posterior: Posterior) -> None:
        """Refuse weights, buffers, settings or a scaling of the adapter other than at the fit.

        Warns:
            UserWarning: If the covered weights are those of the fit rounded to a coarser dtype;
                once for a fit.

        Raises:
            RuntimeError: If a tensor, a setting or a layer's scaling has changed, names it; if the
                model was moved to a dtype in which its posterior is another one's; or, of a last
                layer, if the adapter does not run in the model as it is, see `check_runs`.
        """
        with in_turn(posterior.source):
            self._check(posterior)

    def check_not_rounded(self, posterior: Posterior) -> None:
        """Refuse weights that are those of the fit rounded: they are no place to add data at.

        Raises:
            RuntimeError: If they are.
        """
        apart = rounding_of(list(pairs_of(posterior)))
        if apart:
            raise RuntimeError(
                "data cannot be added: the adapter's weights were rounded to a coarser dtype since "
                f"the posterior was fitted, and differ by {apart:.1e} of their norm. Bring the "
                "weights of the fit back, or fit all the data again"
            )

    def _check(self, posterior: Posterior) -> None:
        self._look(posterior)
        places = self._places
        settings = settings_of(configurations_of(self._configured, self._active))
        factors = scalings(self._layers), settings, held_settings(self._of_model)
        pairs = list(pairs_of(posterior))
        tensors = [tensor for _, tensor, _ in pairs]
        tensors += [t for place in places if (t := place.tensor) is not None]
        # Batch normalisation moves its statistics behind autograd's back, but counts the batches.
        tensors += [b for module in self._counting for b in module.buffers(recurse=False)]
        seen = (id(posterior.mean), traces(tensors), factors)
        beside = self._values_beside(posterior.mean.device)
        if seen == self._seen and are_held(pairs) and torch.equal(beside, self._beside_values):
            return
        self._check_covered(posterior, pairs)
        state = posterior.state
        moved, rescaled = changes(places, state.frozen, posterior.source, state.adapter)
        if (moved or rescaled) and posterior.last_layer is None:
            # An adapter that is merged, gone or idle is named first.
            check_runs(posterior.source, posterior.engine.parameters)
        _refuse(moved, rescaled)
        self._seen, self._beside_values = seen, beside

    def _check_covered(
        self, posterior: Posterior, pairs: Sequence[tuple[str, Tensor, Tensor]]
    ) -> None:
        """Refuse covered weights that are not those of the fit; point out rounded ones."""
        now, fitted = _dtype(posterior), posterior.mean.dtype
        if now != fitted:
            raise RuntimeError(
                f"the adapter is now in {now}, and the posterior was fitted in {fitted}. Fit again "
                "or bring the model back"
            )
        changed = [name for name, now, then in pairs if not are_equal(whole(now), then)]
        if changed:
            raise RuntimeError(
                f"the weights {listed(changed)} have changed since the posterior was fitted "
                "(trained on, loaded over or replaced), so its curvature belongs to others. Fit "
                "again, or load the weights of the fit"
            )
        apart = rounding_of(pairs)
        if apart and self._said_of is not posterior.mean:
            self._said_of = posterior.mean
            warn(
                "the adapter's weights are those that the posterior was fitted at, rounded to a "
                f"coarser dtype since: they differ by {apart:.1e} of their norm. Bring the weights "
                "of the fit back, or fit again, for a posterior of exactly these weights"
            )

    def _values_beside(self, device: torch.device) -> Tensor:
        """Return the adapter's weights that the posterior does not cover, ``(weights,)``.

        But for those in pieces, see `are_held`.
        """
        if device.type == "meta":
            return torch.zeros(0)
        tensors = [t.detach() for place in self._beside if (t := place.tensor) is not None]
        here = [t for t in tensors if t.device.type != "meta" and not is_sharded_tensor(t)]
        return torch.cat([torch.zeros(0, device=device), *(t.flatten().to(device) for t in here)])

    def _look(self, posterior: Posterior) -> None:
        """Find frozen tensors and adapted layers; once, as predictions wait for it."""
        model = posterior.source
        if self._model is not model:
            self._model = model
            self._places = frozen_places(model, posterior.engine.parameters)
            self._counting = list({p.module: None for p in self._places if p.is_buffer})
            self._layers = tuner_layers(model)
            self._configured, self._active = configured(model), active_adapters(model)
            self._of_model = config_holders(model)
            trained = adapter_parameters(model)
            self._beside = [place for place in self._places if id(place.tensor) in trained]


def _refuse(moved: Sequence[TensorPlace], rescaled: list[str]) -> None:
    """Refuse what `changes` found, if anything."""
    buffers = [place.name for place in moved if place.is_buffer]
    if buffers:
        raise RuntimeError(
            f"the buffers {listed(buffers)} have changed since the posterior was fitted (a "
            "forward pass in training mode moves running statistics, even over frozen "
            "weights), so its curvature belongs to another function. Fit again, or load the "
            "buffers of the fit, and keep the model in evaluation mode"
        )
    packed = [place.name for place in moved if isinstance(place, PackedPlace)]
    if packed:
        raise RuntimeError(
            f"the quantised weights {listed(packed)} have changed since the posterior was fitted "
            "(merging an adapter into them, and unmerging it, rounds them anew), so its curvature "
            "belongs to another function. Load the base model and the adapter again, or fit again"
        )
    if moved:
        raise RuntimeError(
            f"the weights {listed([place.name for place in moved])}, which the posterior does "
            "not cover, have changed since it was fitted (trained on, loaded over or "
            "replaced), so its curvature belongs to another function. Fit again, or load the "
            "weights of the fit"
        )
    if rescaled:
        for prefix, owner in ((OF_CONFIGURATION, "adapter"), (OF_MODEL, "base model")):
            fields = [name for name in rescaled if name.startswith(prefix)]
            if fields:
                raise RuntimeError(
                    f"the {owner}'s settings {listed(fields)} have changed since the posterior "
                    "was fitted, so its curvature belongs to another function. Fit again, or bring "
                    "the settings back"
                )
        raise RuntimeError(
            f"the adapter's scaling of {listed(rescaled)} has changed since the posterior was "
            "fitted (by `scaling`, `set_scale` or `scale_layer`), so its curvature belongs to "
            "another function. Fit again, or bring the scaling back"
        )


def _dtype(posterior: Posterior) -> torch.dtype:
    """Return the dtype in which a fit of the model as it is would be."""
    return posterior.dtype if posterior.last_layer is None else head_dtype(posterior.source)


def head_dtype(source: Any) -> torch.dtype:
    """Return the dtype of the copy of the head that a fit of a `LogitsModel` as it is would have.

    Args:
        source: A `LogitsModel`.
    """
    return torch.promote_types(torch.float32, source.head_tensors()[0].dtype)


def traces(tensors: Iterable[Tensor]) -> list[Any]:
    """Return what is another where a tensor was replaced or written to, but for ``.data``.

    Args:
        tensors: In order.
    """
    parts = (part for t in tensors for part in parts_here(t))
    return [(id(t), t.data_ptr(), t.dtype, -1 if t.is_inference() else t._version) for t in parts]
