"""IVON's state for the weights that `Trainer`'s ``load_best_model_at_end`` brought back."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laplace_lora.adaptive.ivon import IVON
from laplace_lora.adaptive.training_checks import check_parameters
from laplace_lora.display.warning import warn

STATE_FILE = "optimizer.pt"


def load_best_state(args: Any, state: Any, model: nn.Module, ivon: IVON) -> None:
    """Bring back the curvature of the best checkpoint along with its weights.

    A `Trainer` loads the weights alone; a posterior of them with the last step's curvature would be
    that of no model. Warns where this cannot be helped, as training has ended.

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
        file = Path(best) / STATE_FILE
        ivon.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        warn(
            f"load_best_model_at_end brought back the weights of {best}, but IVON's curvature is "
            f"that of step {state.global_step}, so its posterior does not belong to the model: "
            f"{error}. Train without load_best_model_at_end, or with save_only_model=False and the "
            "adapter in float32"
        )
