"""Which likelihood a trainer's loss implies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laplace_lora.likelihoods.classification import MULTILABEL_PROBLEM

TASKS = {"RewardTrainer": "reward_modeling", "SFTTrainer": "language_modeling"}  # TRL's


def implied_likelihood(trainer: Any, options: Mapping[str, Any]) -> str:
    """Return the likelihood that a trainer's loss implies, see `LaplaceCallback`.

    Args:
        trainer: The trainer.
        options: Arguments of the posterior.
    """
    for kind in type(trainer).__mro__:
        if kind.__name__ in TASKS:
            return TASKS[kind.__name__]
    model = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    heads = type(base).__name__
    if heads.endswith(("ForCausalLM", "LMHeadModel")) and options.get("target_ids") is None:
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
