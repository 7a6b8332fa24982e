"""Copies of a posterior: deep ones with a model of their own, shallow ones that share it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from laplace.utils.feature_extractor import FeatureExtractor
from torch import Tensor, nn

from laplace_lora.models.changes.holders import undone_in
from laplace_lora.models.changes.thread_hooks import STRUCTURE, remove_copied
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.structures.state import PosteriorState

if TYPE_CHECKING:
    from laplace_lora.posteriors.fitted import FittedLaplace

T = TypeVar("T")
P = TypeVar("P", bound="FittedLaplace")


def deep_copy(posterior: T, source: nn.Module, memo: dict[int, Any]) -> T:
    """Return a copy of a posterior with a copy of its model.

    Args:
        posterior: The posterior.
        source: Its `LogitsModel`; copied first, since a `LastLayerModel` would share it.
        memo: As `copy.deepcopy` passes it.
    """
    twin = object.__new__(type(posterior))
    memo[id(posterior)] = twin
    loader = vars(posterior).get("_train_loader")
    memo[id(loader)] = loader  # data are shared
    # Other threads may be predicting: their copied hooks and modes would be nobody's to undo.
    with in_turn(source), STRUCTURE, undone_in(memo):
        memo[id(source)] = copy.deepcopy(source, memo)
        _copy_rest(posterior, twin, memo)
    for model in (memo[id(source)], vars(twin)["model"]):
        remove_copied(model.modules())
    return twin


def _copy_rest(posterior: object, twin: object, memo: dict[int, Any]) -> None:
    """Copy all but the model, which has been copied."""
    for module in vars(posterior)["model"].modules():
        if isinstance(module, FeatureExtractor):  # of its latest pass, in forward mode no copy can
            memo[id(module._features)] = {}
    entries = {**vars(posterior), "_latest": None}  # made anew when it is asked for
    # A Gaussian process has its settings among its own entries.
    settings = vars(entries["state"].settings) if "state" in entries else entries
    for tensor in settings.values():
        if isinstance(tensor, Tensor) and not tensor.is_leaf:  # by which the evidence was derived
            memo[id(tensor)] = tensor.detach().clone()
    vars(twin).update({k: copy.deepcopy(v, memo) for k, v in entries.items()})


def shallow_copy(posterior: T) -> T:
    """Return a copy of a posterior over the same model; their states go separate ways."""
    twin = object.__new__(type(posterior))
    vars(twin).update(vars(posterior))
    if "state" in vars(twin):  # a Gaussian process has its settings among its own entries
        state = vars(twin)["state"]
        vars(twin).update(state=state.with_settings(state.settings.own()), _latest=None)
    return twin


def unfitted_copy(posterior: P) -> P:
    """Return a copy over the same model that has not been fitted, with the settings as they are."""
    twin = copy.copy(posterior)
    twin._install(PosteriorState(settings=twin.state.settings))
    return twin


def refuse_pickling(posterior: object) -> NoReturn:
    """Refuse to pickle a posterior, as `pickle`, `torch.save` and multiprocessing ask for.

    Raises:
        TypeError: Always; says what to do instead.
    """
    name = type(posterior).__name__
    if not hasattr(posterior, "save_pretrained"):
        raise TypeError(
            f"a {name} cannot be pickled; keep `la.state_dict()`, and load it into a new one by "
            "`load_state_dict`"
        )
    raise TypeError(
        f"a {name} cannot be pickled; save it with `la.save_pretrained(folder)` and load it with "
        "`from_pretrained(peft_model, folder)`, or keep `la.state_dict()`"
    )
