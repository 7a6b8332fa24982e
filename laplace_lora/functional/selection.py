"""Select linear maps by keywords in their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from laplace_lora.adapters.discovery import linear_maps
from laplace_lora.adapters.maps import LinearMap
from laplace_lora.data.sharding import unwrapped

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
        ValueError: If no linear map is selected; lists some that exist. If ``match`` is unknown.
    """
    if match not in MATCHES:
        raise ValueError(f"match must be one of {MATCHES}, got {match!r}")
    if isinstance(target_module_keywords, str):
        raise TypeError(f"give a list of keywords, such as [{target_module_keywords!r}]")
    patterns = [
        re.compile(re.escape(keyword))
        if match == "substring" or not keyword
        else re.compile(rf"(?<![^._]){re.escape(keyword)}(?![^._])", re.IGNORECASE)
        for keyword in target_module_keywords
    ]
    candidates = [linear for linear in linear_maps(unwrapped(model)) if type(linear) is LinearMap]
    selected = [linear for linear in candidates if any(p.search(linear.name) for p in patterns)]
    if not selected:
        part = "a whole part" if match == "parts" else "any part"
        raise ValueError(
            f"target_module_keywords={list(target_module_keywords)} select no linear module by "
            f"{part} of its name; there are {[linear.name for linear in candidates[:8]]}, ..."
        )
    return [(linear, linear.module.bias is not None and not exclude_bias) for linear in selected]
