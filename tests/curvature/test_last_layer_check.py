"""laplace-torch's default subset, the last layer, over models that are no `LastLayerModel`."""

import pytest
from laplace import Laplace

from laplace_lora import LogitsModel, LoraGGN
from support.batches import loader, token_batch
from support.last_layer import last_layer_logits_model
from support.models import peft_model
from support.references import assert_near
from support.rows_apart import choice_batch, loader_of, wrapped

BATCH = token_batch((4, 2, 6), seed=9)


def default(model, structure="kron", **kwargs):
    return Laplace(model, "classification", hessian_structure=structure, backend=LoraGGN, **kwargs)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("llama", r"'.*score.modules_to_save.default', sees an input of shape \(3, 1, 16\)"),
        ("llama-lm", "lm_head', is frozen"),
        ("bert-frozen", "classifier', is frozen"),
        ("choice", "has 1 outputs, and the model 3"),
    ],
)
def test_last_layers_that_would_fail_to_predict_are_refused_in_the_fit(name, fault):
    is_choice = name == "choice"
    model = wrapped("bert") if is_choice else last_layer_logits_model(name)
    data = loader_of(choice_batch(), 2) if is_choice else loader()
    la = default(model)
    with pytest.raises(ValueError, match=f"{fault}.*LastLayerModel.*'lora_last_layer'"):
        la.fit(data)


@pytest.mark.parametrize(
    ("name", "options"),
    [("bert", {}), ("roberta", {}), ("llama", {"feature_reduction": "pick_last"})],
)
def test_linear_heads_of_one_vector_are_taken(name, options):
    la = default(LogitsModel(peft_model(name)), "full", **options)
    reference = Laplace(LogitsModel(peft_model(name)), "classification", "lora_last_layer", "full")
    for each in (la, reference):
        each.fit(loader())
    assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
    assert_near(la(BATCH), reference(BATCH, link_approx="probit"))
