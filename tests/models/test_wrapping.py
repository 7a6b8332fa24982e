"""Models whose outputs are those of every token, under likelihoods of whole examples."""

import pytest
import torch
from laplace import Laplace
from transformers import VisualBertConfig, VisualBertForQuestionAnswering

from laplace_lora import (
    DiagLoraLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraGGN,
)
from laplace_lora.evaluation import diagonal_laplace
from laplace_lora.likelihoods.registry import token_likelihood
from laplace_lora.models.token_classifier import TokenClassifier
from support.batches import loader
from support.models import bert_config, peft_model
from support.spans import question_loader, reader
from support.tokens import tagger

MODELS = {"token_classification": tagger, "question_answering": reader}
WHOLE = "every token of a text.*whole examples: use likelihood="


@pytest.mark.parametrize("likelihood", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("right", MODELS)
def test_the_right_likelihood_is_named(right, likelihood):
    model = MODELS[right]()
    for given in (model, LogitsModel(model)):
        with pytest.raises(ValueError, match=WHOLE + repr(right)):
            KronLoraLaplace(given, likelihood)
    KronLoraLaplace(model, right)


@pytest.mark.parametrize("right", MODELS)
def test_so_it_is_on_every_way_to_a_posterior(right):
    model = MODELS[right]()
    ways = (
        lambda: KronLoraLLLaplace(model, "classification"),
        lambda: FunctionalLoraLLLaplace(model, "classification", n_subset=2),
        lambda: KronLoraLaplace(model, "reward_modeling"),
        lambda: diagonal_laplace(model, question_loader()),
        lambda: Laplace(
            LogitsModel(model), "classification", subset_of_weights="lora", hessian_structure="kron"
        ),
    )
    for way in ways:
        with pytest.raises(ValueError, match=WHOLE + repr(right)):
            way()
    with pytest.raises(ValueError, match=WHOLE):
        KronLoraLaplace(TokenClassifier(tagger()), "classification")


def first_token(returned):
    return returned.logits[:, 0]


def test_an_output_of_the_users_own_is_of_whole_examples():
    model = LogitsModel(tagger(), output=first_token)
    la = DiagLoraLaplace(model, "classification")
    la.fit(loader())
    assert la.log_marginal_likelihood().isfinite()


def test_a_plain_backend_asks_for_nothing():
    model = LogitsModel(tagger(), output=first_token)
    options = {"subset_of_weights": "all", "hessian_structure": "diag", "backend": LoraGGN}
    Laplace(model, "classification", **options).fit(loader())


def test_answers_by_classes_are_no_parts_of_a_text():
    """As of models that answer questions about images."""
    torch.manual_seed(0)
    sizes = {"visual_embedding_dim": 8, "num_labels": 4}
    base = VisualBertForQuestionAnswering(bert_config(VisualBertConfig, **sizes))
    assert token_likelihood(base) is None
    assert token_likelihood(reader().get_base_model()) == "question_answering"
    assert token_likelihood(peft_model("bert").get_base_model()) is None
