"""Which likelihood a trainer's loss implies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laplace_lora.likelihoods.classification import MULTILABEL_PROBLEM

TASKS = {"RewardTrainer": "reward_modeling", "SFTTrainer": "language_modeling"}  # TRL's
LIBRARIES = ("transformers", "trl")


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
    model = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
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
    if heads.endswith("ForTokenClassification"):
        return "token_classification"
    if heads.endswith("ForQuestionAnswering"):
        return "question_answering"
    problem = getattr(config, "problem_type", None)
    if problem == MULTILABEL_PROBLEM:
        return "multilabel"
    if "Classification" in heads and (
        problem == "regression" or getattr(config, "num_labels", None) == 1
    ):
        return "regression"
    return "classification"


def own_loss(trainer: Any) -> str | None:
    """Return what makes a trainer's loss another than its model's, ``None`` if nothing is known to.

    Args:
        trainer: The trainer.
    """
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "compute_loss_func"
    for kind in type(trainer).__mro__:
        if "compute_loss" in vars(kind):
            is_known = kind.__module__.partition(".")[0] in LIBRARIES
            if not is_known:
                return f"{kind.__name__}.compute_loss"
            break
    return "label_smoothing_factor" if trainer.args.label_smoothing_factor else None
