"""What a posterior recognises its model by, and refusing another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from laplace_lora.adapters.configuration import active_configurations
from laplace_lora.adapters.packed_weights import bits_of
from laplace_lora.adapters.peft_files import base_changing_start
from laplace_lora.adapters.peft_state import adapter_parameters, replaced_parameters
from laplace_lora.adapters.plain_names import plain_names
from laplace_lora.data.sharding import in_pieces, whole
from laplace_lora.storage.fingerprint import (
    buffer_fingerprint,
    exact_fingerprint,
    sampled_fingerprint,
)
from laplace_lora.storage.same_function import (
    check_function,
    function_identity,
    has_layers,
    other_dtype,
)
from laplace_lora.structures.posterior import Posterior

IN_USE = "base_in_use"
BUFFERS = "buffers"
BASE_BITS = "base_bits"
ORDER = "order"  # in which tensors are hashed; files of earlier versions do not say
BY_NAME = "names"
CHANGING_ANEW = ("pissa_niter", "corda", "lora_ga")  # starts that are others at each loading


def identity(posterior: Posterior, plain: bool = True, by_name: bool = True) -> dict[str, Any]:
    """Return what a posterior must find again: its tensors, their MAP values and the other weights.

    Args:
        posterior: The posterior; its model is read, not its state.
        plain: Whether names are those without idle adapters, see `plain_names`; ``False`` takes
            them as PEFT has them, as earlier versions did.
        by_name: Whether tensors are hashed in the order of their names; ``False`` takes them as
            the model has them, as earlier versions did.
    """
    engine, others = posterior.engine, _others(posterior, plain, by_name)
    names = list(map(_naming(posterior, plain), engine.names))
    base = [(name, p) for name, p, active in others if active is None]
    return {
        "parameters": {
            name: list(p.shape) for name, p in zip(names, engine.parameters, strict=True)
        },
        "weights": exact_fingerprint(zip(names, engine.parameters, strict=True)),
        "adapter": exact_fingerprint((name, p) for name, p, active in others if active),
        "base": sampled_fingerprint(base),
        IN_USE: sampled_fingerprint(base_in_use(posterior, plain, by_name)),
        ORDER: BY_NAME if by_name else None,
        BUFFERS: buffer_fingerprint(posterior.source),
        **function_identity(posterior.source, plain),
    }


def base_in_use(
    posterior: Posterior, plain: bool = True, by_name: bool = True
) -> list[tuple[str, Tensor]]:
    """Return the weights of the base model that count, with their names.

    A head that the adapter replaces is random in a base model that came without one.

    Args:
        posterior: The posterior.
        plain: As in `identity`.
        by_name: As in `identity`.
    """
    replaced = replaced_parameters(posterior.source)
    others = _others(posterior, plain, by_name)
    return [(name, p) for name, p, active in others if active is None and id(p) not in replaced]


def known_identity(posterior: Posterior, saved: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return a posterior's identity by the names, and in the order, that a saved one goes by.

    Returns:
        The identity, and the ``plain`` that it was made with.
    """
    by_name = is_by_name(saved)
    found = identity(posterior, by_name=by_name)
    if not by_name and not _has_names(saved, found):
        earlier = identity(posterior, plain=False, by_name=False)
        if _has_names(saved, earlier):
            return earlier, False
    return found, True


def is_by_name(saved: Mapping[str, Any]) -> bool:
    """Return whether a saved identity has hashed tensors in the order of their names.

    Args:
        saved: An identity that `identity` returned, perhaps of an earlier version.
    """
    return bool(saved.get(ORDER) == BY_NAME)


def _has_names(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Return whether what goes by names is the same."""
    named = [name for name in ("parameters", _base_key(saved)) if name in saved]
    return has_layers(saved, found) and all(saved[name] == found[name] for name in named)


def trained_tensors(posterior: Posterior, plain: bool = True) -> list[tuple[str, Tensor]]:
    """Return a posterior's tensors, and the others of the active adapter, with their names.

    Args:
        posterior: The posterior.
        plain: As in `identity`.
    """
    names = map(_naming(posterior, plain), posterior.engine.names)
    covered = zip(names, posterior.engine.parameters, strict=True)
    others = ((name, p) for name, p, active in _others(posterior, plain) if active)
    return [(name, whole(p)) for name, p in (*covered, *others)]


def _naming(posterior: Posterior, plain: bool) -> Callable[[str], str]:
    return plain_names(posterior.source) if plain else str


def _base_key(saved: Mapping[str, Any]) -> str:
    return IN_USE if IN_USE in saved else "base"  # files of earlier versions have this only


def _others(
    posterior: Posterior, plain: bool, by_name: bool = True
) -> list[tuple[str, Tensor, bool | None]]:
    """Return tensors that a posterior does not cover, and whether they are of an adapter."""
    in_pieces(posterior.source.modules())
    name_of = _naming(posterior, plain)
    covered = {id(p) for p in posterior.engine.parameters}
    adapters = adapter_parameters(posterior.source)
    # Other adapters that happen to be loaded do not change what the active one computes.
    others: list[tuple[str, Tensor, bool | None]] = [
        (name_of(name), p, adapters.get(id(p)))
        for name, p in posterior.source.named_parameters()
        if id(p) not in covered and adapters.get(id(p)) is not False
    ]
    # PEFT puts a parameter that it adapts behind its siblings at each pass (`target_parameters`).
    return sorted(others, key=lambda other: other[0]) if by_name else others


def _frozen_names(posterior: Posterior) -> set[str]:
    """Return the names of frozen tensors that a posterior's model uses, plain ones and PEFT's."""
    is_active, name_of = adapter_parameters(posterior.source), _naming(posterior, True)
    used = ((n, p) for n, p in posterior.source.named_parameters() if is_active.get(id(p), True))
    frozen = [name for name, p in used if not p.requires_grad]
    return {*frozen, *map(name_of, frozen)}


def check_identity(
    saved: Mapping[str, Any], found: Mapping[str, Any], posterior: Posterior | None = None
) -> None:
    """Refuse a model that is not the one a posterior was fitted on.

    Args:
        saved: Its identity at the fit.
        found: The model's identity.
        posterior: Where given, a missing tensor is looked for among its model's frozen ones, and
            another quantisation of the base model is named.

    Raises:
        ValueError: If its tensors, their values or the base model are others.
    """
    if saved["parameters"] != found["parameters"]:
        then, now = saved["parameters"], found["parameters"]
        others = [n for n in then if n not in now] or [n for n in now if now[n] != then.get(n)]
        example = others[0]
        advice = "check the active adapter's name and rank"
        if posterior is not None and example in _frozen_names(posterior):
            advice = (
                "it is frozen in the model; make it trainable: a PeftModel's `set_adapter(name)` "
                "does so with an adapter, `requires_grad_(True)` with any other tensor"
            )
        elif example not in then:
            advice = "the model trains that one as well; freeze what was frozen at the fit"
        elif example not in now and "prompt_encoder" in example:
            advice = "PEFT saves prompts without the network that makes them; fit the loaded model"
        raise ValueError(
            f"the posterior covers other tensors than the model trains (e.g. {example!r}); {advice}"
        )
    weights = (
        "the weights are not those that the posterior was fitted at; load the adapter that was "
        "saved with it, in the dtype of the fit, float32, bfloat16 or float16"
    )
    if any("delta_embedding" in name for name in saved["parameters"]):
        weights = (
            "PEFT saves CPT's embeddings with their trained change added; fit the loaded model"
        )
    reasons = {
        "weights": weights,
        "adapter": "other trained weights of the adapter have changed since the posterior was "
        "fitted",
        _base_key(saved): "the base model differs from the one that the posterior was fitted on"
        + (_other_bits(saved, posterior) or _changed_by_loading(posterior)),
        BUFFERS: "the base model's buffers (running statistics of batch normalisation, say) differ "
        "from those that the posterior was fitted with; PEFT does not save them with the adapter, "
        "so save the base model as it was at the fit, and load that" + other_dtype(saved, found),
    }
    for name, reason in reasons.items():
        if name == BUFFERS and name not in saved:
            continue  # files of earlier versions do not have them
        if saved[name] != found[name]:
            raise ValueError(reason)
    check_function(saved, found)


def _other_bits(saved: Mapping[str, Any], posterior: Posterior | None) -> str:
    """Return that a base model is in other bits than at the fit, if files say in which it was."""
    if posterior is None or BASE_BITS not in saved:
        return ""
    then, now = saved[BASE_BITS], bits_of(posterior.source)
    if then == now:
        return ""
    fitted, given = ("not quantised" if n is None else f"in {n} bits" for n in (then, now))
    return f": that was {fitted}, and this one is {given}; load it in the same way"


def _changed_by_loading(posterior: Posterior | None) -> str:
    """Return that an adapter changes its base model, and how its posterior can be loaded."""
    configs = [] if posterior is None else active_configurations(posterior.source)
    starts = [start for config in configs if (start := base_changing_start(config))]
    if not starts:
        return ""
    loading = f": loading an adapter with init_lora_weights={starts[0]!r} changes the base model, "
    if not starts[0].lower().startswith(CHANGING_ANEW):
        return loading + (
            "and its start is computed from it: load the same base model in the dtype of the fit"
        )
    return loading + (
        "and not as before, as the start was drawn at random or computed from data. Take the model "
        "of the fit, set its peft_config[...].init_lora_weights = True, save the adapter, and then "
        "the base model as it is (model.unload().save_pretrained(...)): the posterior loads around "
        "these"
    )
