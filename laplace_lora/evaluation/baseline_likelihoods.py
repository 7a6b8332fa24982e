"""Which likelihood a baseline's probabilities are of, and refusing models that have none."""

from __future__ import annotations

from torch import Tensor

from laplace_lora.data.batches import Batch, model_inputs
from laplace_lora.data.pairs import as_pairs, is_pair
from laplace_lora.evaluation.rows import with_suffixes
from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.likelihoods.classification import MULTILABEL_PROBLEM
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.models.logits_model import LogitsModel

LIKELIHOODS = ("classification", "multilabel")
REGRESSION = (
    "baselines give probabilities: of a regression fit a posterior, whose la.predict(loader) gives "
    "mean, std and labels"
)
ONE_OUTPUT = (
    "the model has a single output, which is no class. A reward model answers pairs "
    "('input_ids_chosen' and 'input_ids_rejected', see laplace_lora.data.pairs.as_pairs), a label "
    f"that applies or not is likelihood='multilabel', and {REGRESSION}"
)


def likelihood_name(model: LogitsModel) -> str:
    """Return the likelihood that a model's configuration says.

    That of a single output is left open: rewards of pairs are compared as two classes.
    """
    if model.problem_type == "regression" and model.n_outputs != 1:
        return "regression"
    return "multilabel" if model.problem_type == MULTILABEL_PROBLEM else "classification"


def baseline_objective(model: LogitsModel, likelihood: str | None) -> Likelihood:
    """Return the likelihood that is asked for, or that a model's configuration says.

    Raises:
        ValueError: If it has no probabilities.
    """
    if likelihood not in (None, *LIKELIHOODS):
        raise ValueError(
            f"likelihood must be one of {LIKELIHOODS}, got {likelihood!r}; {REGRESSION}"
        )
    name = likelihood or likelihood_name(model)
    if name not in LIKELIHOODS:
        raise ValueError(
            f"the model's configuration says problem_type={model.problem_type!r}, and {REGRESSION}"
        )
    return likelihood_of(name)


def check_has_classes(objective: Likelihood, logits: Tensor) -> None:
    """Refuse a single logit ``(…, 1)`` of a softmax, whose probability is 1 whatever it is.

    Raises:
        ValueError: If there is only one.
    """
    if not objective.has_independent_labels and logits.shape[-1] < 2:
        raise ValueError(ONE_OUTPUT)


def in_pairs(batch: Batch, label_key: str) -> Batch:
    """Return a reward model's batch as pairs, see `as_pairs`.

    Raises:
        ValueError: If it has labelled single texts, as for a regression.
    """
    batch = with_suffixes(batch, label_key)
    if not is_pair(model_inputs(batch)):
        raise ValueError(ONE_OUTPUT)
    return as_pairs(batch, label_key)
