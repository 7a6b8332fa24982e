"""Running sensitivities of AdaLoRA's triplets in a checkpoint of a `Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laplace_lora.adaptive.scores import Components, SensitivityScore

STATE_FILE = "adalora_sensitivity.safetensors"
VALUES = "values"  # of the singular values, by which a checkpoint is known again


def save_sensitivities(score: SensitivityScore, layers: Sequence[Components], folder: Path) -> None:
    """Save the averages of a score beside a checkpoint.

    Args:
        score: One that has averages of every parameter.
        layers: The adapted layers.
        folder: The checkpoint's.
    """
    tensors: dict[str, Tensor] = {}
    for name, p in _named_parameters(layers).items():
        mean, deviation = score.averages[p]
        tensors |= {f"{name}.mean": mean, f"{name}.deviation": deviation}
        if name.endswith(".E"):
            tensors[f"{name}.{VALUES}"] = p.detach().clone()
    save_file(tensors, folder / STATE_FILE)


def load_sensitivities(score: SensitivityScore, layers: Sequence[Components], folder: Path) -> None:
    """Load the averages of a score.

    Args:
        score: Where they go.
        layers: The adapted layers, with the checkpoint's weights.
        folder: Where the checkpoint is looked for.

    Raises:
        ValueError: If the file is missing, or was saved with other weights than the model has.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise ValueError(f"cannot resume: {path} with the sensitivities is missing")
    tensors, parameters = load_file(path), _named_parameters(layers)
    for name, p in parameters.items():
        saved = tensors.get(f"{name}.{VALUES}")
        if saved is not None and not torch.equal(saved.float(), p.detach().cpu().float()):
            raise ValueError(
                f"cannot resume: {path} was saved with other weights than those that training goes "
                "on with; it is looked for in output_dir, which must be the checkpoint's"
            )
    score.averages = {
        p: (tensors[f"{name}.mean"].to(p.device), tensors[f"{name}.deviation"].to(p.device))
        for name, p in parameters.items()
    }


def _named_parameters(layers: Sequence[Components]) -> dict[str, nn.Parameter]:
    return {
        f"{layer.name}.{part}": p
        for layer in layers
        for part, p in zip("ABE", layer.parameters, strict=True)
    }
