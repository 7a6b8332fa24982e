"""Baselines give probabilities: regressions are refused by name, rewards of pairs are not."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora.evaluation import (
    MAP,
    LoraEnsemble,
    MCDropout,
    TemperatureScaling,
    TrainingFreeBayes,
    diagonal_laplace,
    evaluate,
)
from support.batches import split_rows, token_batch
from support.models import peft_model
from support.preferences import pair_batch

BATCH = token_batch((3, 5, 4, 6))
NO_CLASS = r"a single output, which is no class.*of a regression fit a posterior.*la.predict"


def regressing(outputs, says=True):
    model = peft_model("bert", num_labels=outputs)
    if says:
        model.get_base_model().config.problem_type = "regression"
    model.add_adapter("other", model.peft_config["default"])
    return model


def targets(outputs):
    y = torch.randn(4, outputs, generator=torch.Generator().manual_seed(0))
    return [{**BATCH, "labels": y.squeeze(1)}]


BASELINES = {
    "map": lambda model, data: MAP(model),
    "temperature": TemperatureScaling,
    "dropout": lambda model, data: MCDropout(model, n_samples=2),
    "ensemble": lambda model, data: LoraEnsemble(model),
    "training-free": lambda model, data: TrainingFreeBayes(model, data, n_samples=2),
}


@pytest.mark.parametrize("name", BASELINES)
def test_several_outputs_are_refused_where_the_configuration_says_regression(name):
    with pytest.raises(ValueError, match=r"problem_type='regression', and baselines.*la.predict"):
        BASELINES[name](regressing(3), targets(3))


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("name", BASELINES)
def test_a_single_output_is_no_probability(name, says):
    model, data = regressing(1, says), targets(1)
    unlabelled = {key: value for key, value in BATCH.items() if key != "labels"}
    with pytest.raises(ValueError, match=NO_CLASS):
        BASELINES[name](model, data)(unlabelled)
    with pytest.raises(ValueError, match=NO_CLASS):
        evaluate(BASELINES[name](model, data), data)


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("name", BASELINES)
def test_rewards_of_pairs_go_on(name, says):
    pairs = {**pair_batch((3, 4), (5, 2)), "labels": torch.tensor([1, 0])}
    predict = BASELINES[name](regressing(1, says), [pairs])
    assert predict(pairs).shape == (2, 2)
    assert evaluate(predict, [pairs], bootstrap=2).values["accuracy"] >= 0


def test_unlabelled_halves_are_pairs_as_before():
    rows = token_batch((3, 4, 5, 2))
    halves = {key: value for key, value in rows.items() if key != "labels"}
    assert TemperatureScaling(regressing(1), [halves]).temperature > 0


def test_a_posterior_takes_the_likelihood_of_the_configuration():
    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    data = DataLoader(split_rows({**BATCH, "labels": y}), batch_size=2)
    assert diagonal_laplace(regressing(3), data).likelihood == "regression"
