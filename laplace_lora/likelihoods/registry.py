"""Likelihoods by name: the only place where their names are compared."""

from __future__ import annotations

from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.likelihoods.classification import Classification
from laplace_lora.likelihoods.language_modeling import LanguageModeling
from laplace_lora.likelihoods.multilabel import Multilabel
from laplace_lora.likelihoods.question_answering import QuestionAnswering
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
