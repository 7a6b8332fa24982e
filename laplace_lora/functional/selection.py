"""Which linear maps of a model keywords select.

By names alone; what is summed over the maps belongs to `hooks` and `kronecker`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from laplace_lora.adapters.discovery import linear_maps
from laplace_lora.adapters.maps import LinearMap


def selected_maps(
    model: nn.Module, target_module_keywords: Sequence[str], exclude_bias: bool
) -> list[tuple[LinearMap, bool]]:
    """Return the linear maps that a keyword selects, and whether each brings its bias.

    A keyword selects by whole parts of a name, whatever their case, where dots and underscores
    part: ``"lora"`` selects ``q_proj.lora_A.default``, ``"q_proj"`` too, ``"layers.1"`` not
    ``layers.11``. The empty keyword selects everything.

    Args:
        model: Any module; its `nn.Linear` and `Conv1D` modules count.
        target_module_keywords: Parts of module names.
        exclude_bias: Treat all biases as fixed.

    Raises:
        TypeError: If the keywords are a single string.
        ValueError: If no linear map is selected; lists some there are.
    """
    if isinstance(target_module_keywords, str):
        raise TypeError(f"give a list of keywords, such as [{target_module_keywords!r}]")
    patterns = [
        re.compile(rf"(?<![^._]){re.escape(keyword)}(?![^._])" if keyword else "", re.IGNORECASE)
        for keyword in target_module_keywords
    ]
    every = [linear for linear in linear_maps(model) if type(linear) is LinearMap]
    found = [linear for linear in every if any(p.search(linear.name) for p in patterns)]
    if not found:
        raise ValueError(
            f"target_module_keywords={list(target_module_keywords)} select no linear module by a "
            f"whole part of its name; there are {[linear.name for linear in every[:8]]}, ..."
        )
    return [(linear, linear.module.bias is not None and not exclude_bias) for linear in found]
