"""Likelihoods by name: the only place where their names are compared."""

from __future__ import annotations

import inspect
from typing import Any

from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.likelihoods.classification import Classification
from laplace_lora.likelihoods.language_modeling import LanguageModeling
from laplace_lora.likelihoods.multilabel import Multilabel
from laplace_lora.likelihoods.question_answering import START, QuestionAnswering
from laplace_lora.likelihoods.regression import Regression
from laplace_lora.likelihoods.reward_modeling import RewardModeling
from laplace_lora.likelihoods.token_classification import TokenClassification

LIKELIHOODS: dict[str, Likelihood] = {
    likelihood.name: likelihood
    for likelihood in (
        Classification(),
        Multilabel(),
        Regression(),
        RewardModeling(),
        LanguageModeling(),
        TokenClassification(),
        QuestionAnswering(),
    )
}


def likelihood_of(name: str) -> Likelihood:
    """Return a likelihood by its name.

    Raises:
        ValueError: If none has that name.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {tuple(LIKELIHOODS)}, got {name!r}")
    return LIKELIHOODS[name]


def token_likelihood(base: Any) -> str | None:
    """Return the likelihood of a transformer with outputs for every token of a text.

    Args:
        base: The transformer, without PEFT's wrapper.

    Returns:
        ``None`` for any other. Models that answer questions about images, by classes, take no
        places of answers in a text.
    """
    heads = type(base).__name__
    if heads.endswith("ForTokenClassification"):
        return "token_classification"
    finds_answers = START in inspect.signature(base.forward).parameters
    is_reader = heads.endswith("ForQuestionAnswering") and finds_answers
    return "question_answering" if is_reader else None
