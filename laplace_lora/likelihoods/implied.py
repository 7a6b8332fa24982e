"""Which likelihood a transformer with outputs for every token implies."""

from __future__ import annotations

import inspect
from typing import Any

from laplace_lora.likelihoods.question_answering import START


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
