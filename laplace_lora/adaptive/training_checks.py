"""What a `Trainer` must do, and not do, for its optimiser's posterior to be right."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def check_parameters(model: nn.Module, optimizer: Optimizer, part: str = "") -> None:
    """Refuse an optimiser that does not hold what the model trains.

    PEFT replaces the parameters of a half-precision adapter by new ones in float32 when it loads a
    checkpoint into it; an optimiser built before goes on with the old ones, and trains nothing.

    Args:
        model: The model, with the weights that training begins from.
        optimizer: Its optimiser.
        part: Check only parameters with this in their name.

    Raises:
        ValueError: If a trainable parameter is not in the optimiser's groups; names it.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        # PEFT makes AdaLoRA's rank counts trainable, whose name ends so; none has a gradient.
        counted = ".ranknum." in name
        if p.requires_grad and part in name and not counted and id(p) not in held:
            raise ValueError(
                f"the optimizer does not hold {name!r}, which the model trains. When PEFT loads a "
                "checkpoint, it replaces the parameters of a half-precision adapter by new ones in "
                "float32: make the adapter float32, as PEFT does with its default "
                "autocast_adapter_dtype=True, before the optimizer is built from all parameters"
            )


def check_settings(args: Any, sync: bool = False) -> None:
    """Refuse settings of a `Trainer` that would spoil IVON's posterior.

    Args:
        args: The ``TrainingArguments``.
        sync: Whether IVON averages over processes.

    Raises:
        ValueError: If gradients are clipped, averaged twice over processes, or checkpoints written
            in the middle of a step.
    """
    if sync and args.world_size > 1:
        raise ValueError(
            "IVON(sync=True) averages what processes collect at draws of their own, but a Trainer "
            "averages their gradients before, which must come from the same draw or the curvature "
            "is too small: leave sync out, and IVONCallback lets all processes draw the same"
        )
    if args.max_grad_norm:
        raise ValueError(
            "clipped gradients bias IVON's curvature: set max_grad_norm=0 in the "
            "TrainingArguments; IVON's clip_radius bounds the steps"
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(
            "enable_jit_checkpoint saves in the middle of a step, where weights are drawn from "
            "IVON's posterior instead of its mean: leave it out of the TrainingArguments, and set "
            "save_steps"
        )
