"""What a `Trainer`'s checkpoints hold beside weights: IVON's state, AdaLoRA's sensitivities."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laplace_lora.adaptive.ivon import IVON
from laplace_lora.adaptive.scores import Components, SensitivityScore
from laplace_lora.adaptive.training_checks import check_parameters
from laplace_lora.display.warning import warn

OPTIMIZER_FILE = "optimizer.pt"  # the `Trainer`'s
SENSITIVITY_FILE = "adalora_sensitivity.safetensors"
VALUES = "values"  # of the singular values, by which a checkpoint is known again


def load_best_state(args: Any, state: Any, model: nn.Module, ivon: IVON) -> None:
    """Bring back the curvature of the best checkpoint along with its weights.

    For ``load_best_model_at_end`` a `Trainer` loads the weights alone; a posterior of them with the
    last step's curvature would be that of no model. Warns where this cannot be helped, as training
    has ended.

    Args:
        args: The ``TrainingArguments``.
        state: The ``TrainerState``, at the end of training.
        model: The model.
        ivon: Its optimiser.
    """
    best, step = state.best_model_checkpoint, getattr(state, "best_global_step", None)
    if not args.load_best_model_at_end or best is None or step == state.global_step:
        return
    try:
        check_parameters(model, ivon)
        file = Path(best) / OPTIMIZER_FILE
        ivon.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        warn(
            f"load_best_model_at_end brought back the weights of {best}, but IVON's curvature is "
            f"that of step {state.global_step}, so its posterior does not belong to the model: "
            f"{error}. Train without load_best_model_at_end, or with save_only_model=False and the "
            "adapter in float32"
        )


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
    save_file(tensors, folder / SENSITIVITY_FILE)


def load_sensitivities(score: SensitivityScore, layers: Sequence[Components], folder: Path) -> None:
    """Load the averages of a score.

    Args:
        score: Where they go.
        layers: The adapted layers, with the checkpoint's weights.
        folder: Where the checkpoint is looked for.

    Raises:
        ValueError: If the file is missing, or was saved with other weights than the model has.
    """
    path = folder / SENSITIVITY_FILE
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
