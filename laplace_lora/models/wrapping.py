"""`wrapped`: a user's model with the outputs that a likelihood reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from laplace_lora.data.sharding import unwrapped
from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.likelihoods.registry import token_likelihood
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.models.span_model import SpanModel
from laplace_lora.models.token_classifier import TokenClassifier
from laplace_lora.models.token_model import TokenModel
from laplace_lora.models.wrapped_model import base_of

# What `target_ids` choose, and what these models have in its place.
NO_ANSWERS = {
    TokenModel: "answers, likelihood='classification'; language modelling predicts the whole "
    "vocabulary",
    TokenClassifier: "answers of a language model; a token classifier has classes",
    SpanModel: "answers of a language model; these answers are parts of a text",
}


def wrapped(
    objective: Likelihood,
    model: nn.Module,
    target_ids: Sequence[int] | Tensor | None,
    mask_token_id: int | None,
) -> LogitsModel:
    """Return a model as a `LogitsModel`, or as the one for all tokens that a likelihood needs.

    Raises:
        ValueError: If the model is none for the likelihood, is wrapped for other outputs already,
            or answers are asked for where there are none.
    """
    if not (objective.has_spans or objective.rows_are_tokens):
        found = LogitsModel.wrap(model, target_ids, mask_token_id)
        _check_reads_whole_texts(objective, found)
        return found
    kind: type[TokenModel | TokenClassifier | SpanModel]
    kind = TokenModel if objective.predicts_tokens else TokenClassifier
    kind = SpanModel if objective.has_spans else kind
    if mask_token_id is not None:
        raise ValueError(
            "`mask_token_id` says where a masked language model answers; a model of tokens has "
            "outputs at all of them"
        )
    if target_ids is not None:
        raise ValueError(f"`target_ids` choose {NO_ANSWERS[kind]}")
    model = unwrapped(model)
    if isinstance(model, LogitsModel) and not isinstance(model, kind):
        raise ValueError(f"likelihood={objective.name!r} takes the PeftModel, not a LogitsModel")
    return model if isinstance(model, kind) else kind(model)


def _check_reads_whole_texts(objective: Likelihood, model: LogitsModel) -> None:
    """Refuse a model whose own outputs are those of every token of a text.

    Raises:
        ValueError: If it is one; names its likelihood.
    """
    base = base_of(model.model)
    of_tokens = token_likelihood(base)
    if of_tokens is not None and model.output is None and model.target_ids is None:
        raise ValueError(
            f"{type(base).__name__} has outputs for every token of a text, and "
            f"likelihood={objective.name!r} is about whole examples: use "
            f"likelihood={of_tokens!r}, or give LogitsModel an `output` callable that makes "
            "(batch, outputs) of what the model returns"
        )
