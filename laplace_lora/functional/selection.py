"""Select linear maps by keywords in their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from laplace_lora.adapters.discovery import linear_maps
from laplace_lora.adapters.maps import LinearMap
from laplace_lora.adapters.selection import listed
from laplace_lora.data.sharding import unwrapped
from laplace_lora.display.warning import warn

MATCHES = ("parts", "substring")


def selected_maps(
    model: nn.Module,
    target_module_keywords: Sequence[str],
    exclude_bias: bool,
    match: str,
) -> list[tuple[LinearMap, bool]]:
    """Return the linear maps that a keyword selects, and whether each includes its bias.

    A keyword matches whole parts of a name, separated by dots and underscores, in upper or lower
    case: ``"lora"`` and ``"q_proj"`` select ``q_proj.lora_A.default``, ``"layers.1"`` does not
    select ``layers.11``. The empty keyword selects everything.

    Args:
        model: Any module; only its `nn.Linear` and `Conv1D` modules are considered.
        target_module_keywords: Parts of module names.
        exclude_bias: Treat all biases as fixed.
        match: ``"parts"`` as above; ``"substring"`` for a keyword anywhere in a name, upper and
            lower case apart, as in bayesian_lora.

    Raises:
        TypeError: If the keywords are a single string.
        ValueError: If there are no keywords, or one selects no linear map; lists some that exist.
            If ``match`` is unknown.

    Warns:
        UserWarning: If a keyword matches trainable tensors of other modules.
    """
    if match not in MATCHES:
        raise ValueError(f"match must be one of {MATCHES}, got {match!r}")
    if isinstance(target_module_keywords, str):
        raise TypeError(f"give a list of keywords, such as [{target_module_keywords!r}]")
    patterns = {
        keyword: re.compile(re.escape(keyword))
        if match == "substring" or not keyword
        else re.compile(rf"(?<![^._]){re.escape(keyword)}(?![^._])", re.IGNORECASE)
        for keyword in target_module_keywords
    }
    model = unwrapped(model)
    candidates = [linear for linear in linear_maps(model) if type(linear) is LinearMap]
    idle = [
        keyword
        for keyword, pattern in patterns.items()
        if not any(pattern.search(linear.name) for linear in candidates)
    ]
    if idle or not patterns:
        part = "any part of its name"
        if match == "parts":
            part = "a whole part of its name (any part with match='substring')"
        raise ValueError(
            f"target_module_keywords={idle} select no linear module by {part}; there are "
            f"{[linear.name for linear in candidates[:8]]}, ..."
        )

    def matches(name: str) -> bool:
        return any(pattern.search(name) for pattern in patterns.values())

    selected = [linear for linear in candidates if matches(linear.name)]
    covered = {id(p) for linear in selected for p, _ in linear.parameters()}
    point_out_left_out(
        name
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in covered and matches(name.rpartition(".")[0])
    )
    return [(linear, linear.module.bias is not None and not exclude_bias) for linear in selected]


def point_out_left_out(names: Iterable[str]) -> None:
    """Warn of trainable tensors that keywords match and that get no factor.

    Args:
        names: Of the tensors; nothing is said if there are none.
    """
    left_out = list(names)
    if left_out:
        warn(
            f"the trainable tensors {listed(left_out)} match target_module_keywords but get no "
            "factors, so they count as fixed: only nn.Linear and Conv1D modules that run get some. "
            "KronLoraLaplace also covers LoRA on embeddings and plain convolutions"
        )
