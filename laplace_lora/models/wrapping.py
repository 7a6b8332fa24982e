"""`wrapped`: a user's model with the outputs that a likelihood reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from laplace_lora.data.sharding import unwrapped
from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.models.span_model import SpanModel
from laplace_lora.models.token_classifier import TokenClassifier
from laplace_lora.models.token_model import TokenModel

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
        return LogitsModel.wrap(model, target_ids, mask_token_id)
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
