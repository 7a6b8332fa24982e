"""Which likelihood a trainer's loss implies, and losses that are another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.classification import MULTILABEL_PROBLEM
from laplace_lora.likelihoods.registry import token_likelihood
from laplace_lora.models.inputs.configs import text_config
from laplace_lora.models.wrapped_model import base_of

TASKS = {"RewardTrainer": "reward_modeling", "SFTTrainer": "language_modeling"}  # TRL's
PLAIN = (None, "nll", "chunked_nll")  # what TRL calls the loss of a language model
ROUTER_LOSS_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")


def implied_likelihood(trainer: Any, options: Mapping[str, Any]) -> str:
    """Return the likelihood that a trainer's loss implies, see `LaplaceCallback`.

    Args:
        trainer: The trainer.
        options: Arguments of the posterior.

    Raises:
        ValueError: If it is a loss of another of TRL's trainers of language models, such as DPO's.
    """
    for kind in type(trainer).__mro__:
        if kind.__name__ in TASKS:
            return TASKS[kind.__name__]
    base = base_of(trainer.model)
    config = getattr(base, "config", None)
    heads = type(base).__name__
    if heads.endswith(("ForCausalLM", "LMHeadModel")) and options.get("target_ids") is None:
        if any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__):
            raise ValueError(
                f"{type(trainer).__name__} trains by a loss that no likelihood stands for, on data "
                "without labels; after training, fit a posterior to labelled texts, "
                "KronLoraLaplace(trainer.model, 'language_modeling').fit(loader)"
            )
        return "language_modeling"
    of_tokens = token_likelihood(base)
    if of_tokens is not None:
        return of_tokens
    problem = getattr(config, "problem_type", None)
    if problem == MULTILABEL_PROBLEM:
        return "multilabel"
    if "Classification" in heads and (
        problem == "regression" or getattr(config, "num_labels", None) == 1
    ):
        return "regression"
    return "classification"


def point_out_own_loss(trainer: Any, likelihood: str, options: Mapping[str, Any]) -> None:
    """Warn where a trainer's loss is another than that of the likelihood that its model implies.

    Args:
        trainer: The trainer.
        likelihood: See `implied_likelihood`.
        options: Arguments of the posterior. Answers by tokens have to be trained by a loss of one's
            own.
    """
    own = _own_loss(trainer)
    if own is not None and options.get("target_ids") is None:
        warn(
            f"the trainer's loss is its own ({own}), and the posterior will be that of a plain "
            f"{likelihood!r}, whose curvature is another wherever the losses differ, as with "
            f"weighted classes or smoothed labels; give likelihood={likelihood!r} if that is meant"
        )


def _own_loss(trainer: Any) -> str | None:
    """Return what makes a loss another than the model's, ``None`` if nothing is known to."""
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "compute_loss_func"
    owner = next((kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind)), None)
    if owner is not None and not _is_plain(owner):
        return f"{owner.__name__}.compute_loss"
    return _own_argument(trainer)


def _is_plain(owner: type) -> bool:
    """Return whether a class's ``compute_loss`` is known, but for what arguments make of it."""
    library = owner.__module__.partition(".")[0]
    # TRL distils by heirs of its SFTTrainer.
    return library == "transformers" or (library == "trl" and owner.__name__ in TASKS)


def _own_argument(trainer: Any) -> str | None:
    """Return the training argument that makes a loss another, ``None`` if none does."""
    args, names = trainer.args, {kind.__name__ for kind in type(trainer).__mro__}
    if "SFTTrainer" in names and (loss := getattr(args, "loss_type", None)) not in PLAIN:
        return f"loss_type={loss!r}"
    if "RewardTrainer" in names and getattr(args, "center_rewards_coefficient", None):
        return "center_rewards_coefficient"
    if args.label_smoothing_factor:
        return "label_smoothing_factor"
    return "output_router_logits" if _adds_router_loss(base_of(trainer.model)) else None


def _adds_router_loss(model: nn.Module) -> bool:
    """Return whether a language model adds to its loss how unevenly it uses its experts."""
    if "Classification" in type(model).__name__:  # those heads leave it out
        return False
    config = text_config(getattr(model, "config", None))
    weights = (getattr(config, name, None) for name in ROUTER_LOSS_WEIGHTS)
    return bool(getattr(config, "output_router_logits", False)) and any(weights)
