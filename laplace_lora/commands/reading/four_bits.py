"""Load a base model in four bits, but for what its adapter trained as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers


def four_bits(device: str, skipped: list[str] | None) -> dict[str, Any]:
    """Return options that load a base model in four bits, but for the modules that are skipped.

    Raises:
        ImportError: If bitsandbytes is missing.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ImportError("--load-in-4bit requires `pip install bitsandbytes`") from None
    compute = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skipped,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def unquantised(saved: Sequence[str] | None, loader: Any, source: str) -> list[str] | None:
    """Return modules that four bits leave as they are; ``None`` for those of transformers alone.

    PEFT trains copies of what an adapter saves as a whole, which four bits cannot be. Modules that
    are named take the place of transformers' own choice (a head, the output embeddings) and so this
    is added, by the names of a model without weights.

    Args:
        saved: ``modules_to_save`` of the adapter.
        loader: Class that loads the base model.
        source: Folder or name of the base model.
    """
    if not saved:
        return None
    make = loader.from_config if hasattr(loader, "from_config") else loader
    with torch.device("meta"):
        empty = make(transformers.AutoConfig.from_pretrained(source))
    whole = [name for name, _ in empty.named_modules() if name.endswith(tuple(saved))]
    quantizer = transformers.quantizers.HfQuantizer
    names: list[str] = quantizer.get_modules_to_not_convert(empty, whole, add_default_skips=True)
    return sorted(names)
