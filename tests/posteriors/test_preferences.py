"""Reward posteriors: the same through laplace-torch, and calls that do not fit."""

import pytest
import torch
from laplace import DiagLaplace, KronLaplace, Laplace

from laplace_lora import FunctionalLoraLLLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from support.models import VOCABULARY, peft_model
from support.posteriors import DENSE
from support.preferences import CHOSEN, pair_batch, pair_loader, reward_posterior, texts
from support.references import assert_near


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_laplace_torch_fits_the_same_posterior(structure):
    model = LogitsModel(peft_model("bert", num_labels=1))
    plain = {"kron": KronLaplace, "diag": DiagLaplace}[structure]
    theirs = plain(model, "reward_modeling", backend=LoraGGN)
    theirs.fit(pair_loader(batch={**pair_batch(), "labels": torch.ones(5, dtype=torch.long)}))
    ours = Laplace(
        model,
        "reward_modeling",
        subset_of_weights="lora",
        hessian_structure=structure,
        **(DENSE if structure == "kron" else {}),
    )
    ours.fit(pair_loader())
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood().double())
    single = texts((4, 4), seed=5)
    assert_near(list(ours(single)), list(theirs(single, pred_type="glm")))


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_a_language_model_is_no_reward_model(name, labels):
    """Whatever its configuration says of labels, which it does not read."""
    model = peft_model(name)
    model.get_base_model().config.num_labels = labels
    with pytest.raises(
        ValueError, match=rf"this one {VOCABULARY}; load it through AutoModelForSeq"
    ):
        KronLoraLaplace(model, "reward_modeling")
    assert LogitsModel(model).n_outputs == VOCABULARY


BATCH = pair_batch()

SINGLE = texts(CHOSEN, 0)


def test_models_and_calls_that_do_not_fit():
    with pytest.raises(ValueError, match="one output, this one 3"):
        KronLoraLaplace(peft_model("bert"), "reward_modeling")
    with pytest.raises(ValueError, match="one output, this one 2"):
        KronLoraLaplace(peft_model("llama-lm"), "reward_modeling", target_ids=[3, 5])
    two = LogitsModel(peft_model("bert", num_labels=1), output=lambda o: o.logits.repeat(1, 2))
    with pytest.raises(ValueError, match="one output, this one 2"):
        KronLoraLaplace(two, "reward_modeling").fit(pair_loader())
    with pytest.raises(ValueError, match="the likelihood is 'reward_modeling'; use another class"):
        FunctionalLoraLLLaplace(peft_model("bert", num_labels=1), "reward_modeling", 3)
    la = reward_posterior()
    with pytest.raises(ValueError, match="pairs are needed here"):
        la.reward_difference(SINGLE)
    with pytest.raises(ValueError, match="pairs are needed here"):
        la(SINGLE, fitting=True)
    with pytest.raises(AttributeError, match="not fitted"):
        reward_posterior(fit=False).reward_difference(BATCH)
