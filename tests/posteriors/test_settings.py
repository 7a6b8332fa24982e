"""Settings, labels and merges that would pass without a word are refused or put right."""

import copy
import math

import pytest
import torch
from laplace import Laplace, Likelihood
from laplace.utils.enums import TuningMethod
from torch.utils.data import DataLoader

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraEF,
    LoraGGN,
    LowRankLoraLaplace,
    start_of,
)
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import posterior
from support.references import assert_near

EVERY = [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace, FullLoraLLLaplace]

BAD = [0.0, -1.0, float("nan"), float("inf")]
BATCH = token_batch((4, 2), seed=3)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise", "temperature"])
def test_the_constructor_refuses_a_bad_setting(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        KronLoraLaplace(peft_model("bert"), "regression", **{name: value})


NAMES = ["prior_precision", "temperature", "covariance_scale", "likelihood_temperature"]


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_setting_leaves_the_posterior_as_it_was(name):
    la = posterior(name="bert")
    before = la(BATCH)
    for value in BAD:
        with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
            setattr(la, name, value)
    if name == "prior_precision":
        with pytest.raises(ValueError, match="must be positive and finite"):
            la.prior_precision = torch.tensor([1.0, -1.0] * (la.n_layers // 2))
        with pytest.raises(ValueError, match="must be positive and finite"):
            la.log_marginal_likelihood(torch.tensor(0.0))
    assert torch.equal(la(BATCH), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("by_weight", [False, True])
def test_a_prior_mean_that_is_not_finite_is_refused(value, by_weight):
    la = posterior(name="bert")
    mean = value
    if by_weight:
        mean = torch.zeros(la.n_params, dtype=torch.float64)
        mean[-1] = value
    before, evidence = la(BATCH), la.log_marginal_likelihood()
    with pytest.raises(ValueError, match="prior_mean must be finite"):
        la.prior_mean = mean
    with pytest.raises(ValueError, match="prior_mean must be finite"):
        KronLoraLaplace(peft_model("bert"), "classification", prior_mean=mean)
    assert torch.equal(la(BATCH), before) and la.log_marginal_likelihood() == evidence


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.bool])
def test_labels_of_any_whole_dtype(dtype):
    la, reference = posterior(name="bert", fit=False), posterior(name="bert", fit=False)
    data = [{**row, "labels": row["labels"].clamp(max=1)} for row in loader().dataset]
    reference.fit(DataLoader(data, batch_size=3))
    la.fit(DataLoader([{**row, "labels": row["labels"].to(dtype)} for row in data], batch_size=3))
    assert la.loss == reference.loss
    assert_near(la(BATCH), reference(BATCH))


@pytest.mark.parametrize("backend", [LoraGGN, LoraEF])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_plain_laplace_torch_takes_labels_of_any_whole_dtype(dtype, backend):
    data = [{**row, "labels": row["labels"].clamp(max=1)} for row in loader().dataset]
    short = [{**row, "labels": row["labels"].to(dtype)} for row in data]
    found = []
    for rows in (short, data):
        model = LogitsModel(peft_model("bert"))
        la = Laplace(model, "classification", "all", "diag", backend=backend)
        la.fit(DataLoader(rows, batch_size=3))
        found.append(la)
    assert found[0].loss == found[1].loss
    assert_near(found[0].H, found[1].H)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor(1)])
def test_fewer_labels_than_rows(labels):
    la = posterior(name="bert", fit=False)
    inputs = {k: v for k, v in token_batch((4, 2, 3)).items() if k != "labels"}
    for batch in ((inputs, labels), {**inputs, "labels": labels}):
        with pytest.raises(ValueError, match="a batch has 3 rows, but labels of shape"):
            la.fit(DataLoader([batch], batch_size=None))


def test_texts_without_a_label_that_counts():
    la = KronLoraLaplace(
        peft_model("llama-lm"), "language_modeling", backend_kwargs={"num_samples": 1}
    )
    data = [{**r, "labels": torch.full_like(r["input_ids"], -100)} for r in loader().dataset]
    with pytest.raises(ValueError, match="no token of the training data has a label that counts"):
        la.fit(DataLoader(data, batch_size=3))
    with pytest.raises(AttributeError, match="not fitted"):
        la.log_marginal_likelihood()


def test_a_posterior_does_not_merge_with_itself():
    la, other = posterior(name="bert"), posterior(name="bert")
    for others in ([la], [other, other]):
        with pytest.raises(ValueError, match="each given once"):
            la.merge(others)
    assert la.n_data == 7
    la.merge([other])
    assert la.n_data == 14


@pytest.mark.parametrize("ids", [["A", "B"], "AB", [True, False], [True, 5]])
def test_answers_that_are_no_tokens(ids):
    with pytest.raises(ValueError, match="two or more different integers"):
        LogitsModel(peft_model("llama-lm"), ids)


def test_a_last_layer_is_not_named():
    with pytest.raises(ValueError, match="leave `last_layer_name` out"):
        KronLoraLLLaplace(peft_model("bert"), "classification", last_layer_name="classifier")


def test_a_last_layer_reduces_no_features():
    with pytest.raises(ValueError, match="feature_reduction would have no effect"):
        KronLoraLLLaplace(peft_model("bert"), "classification", feature_reduction="average")


def test_laplace_torchs_enumerations_are_names():
    la = KronLoraLaplace(peft_model("bert"), Likelihood.CLASSIFICATION)
    la.fit(loader())
    la.optimize_prior_precision(method=TuningMethod.GRIDSEARCH, val_loader=loader())
    assert type(la.likelihood) is str and type(la.tuning.method) is str
    assert "classification" in repr(la) and str(la.tuning).startswith("gridsearch")


def test_tuples_instead_of_outputs():
    model = peft_model("bert")
    model.get_base_model().config.return_dict = False
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    assert_near(la(BATCH), posterior(name="bert")(BATCH))


@pytest.mark.parametrize("cls", EVERY)
def test_a_prior_that_is_changed_in_place_counts(cls):
    la = posterior(cls, "bert")
    before = la(BATCH)
    la.prior_precision.mul_(100)
    after = la(BATCH)
    assert not torch.allclose(after, before)
    evidence = la.log_marginal_likelihood()
    la.prior_precision = 100.0
    assert torch.equal(la(BATCH), after) and la.log_marginal_likelihood() == evidence
    la.prior_mean = torch.zeros(la.n_params, dtype=torch.float64)
    assert la.log_marginal_likelihood() == evidence
    la.prior_mean.add_(1)
    moved = la.log_marginal_likelihood()
    la.prior_mean = 1.0
    assert moved != evidence and torch.isclose(la.log_marginal_likelihood(), moved)


def corrected_evidence(la):
    return la.log_marginal_likelihood(correction=True, train_loader=loader())


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, LowRankLoraLaplace])
def test_a_prior_around_a_number_follows_one_around_a_start(cls, tmp_path):
    model = peft_model("bert")
    la = cls(model, "classification", prior_mean=start_of(model))
    la.fit(loader())
    around_start = corrected_evidence(la)
    fresh = cls(model, "classification")
    fresh.fit(loader())
    expected = corrected_evidence(fresh)
    la.save_pretrained(tmp_path, "exact")
    for each in (la, cls.from_pretrained(model, tmp_path)):
        each.prior_mean = 0.0
        assert_near(corrected_evidence(each), expected, 1e-9)
        assert "around zero" in str(each)
        each.save_pretrained(tmp_path / "changed")
        each.prior_mean = start_of(model)
        assert_near(corrected_evidence(each), around_start, 1e-9)


def test_a_posterior_keeps_its_settings_when_the_given_tensors_change():
    la = posterior(name="bert")
    prior, mean = torch.ones(1), torch.zeros(la.n_params, dtype=torch.float64)
    la.prior_precision, la.prior_mean = prior, mean
    before, evidence = la(BATCH), la.log_marginal_likelihood()
    prior.mul_(100)
    mean.add_(1)
    assert la.prior_precision == 1 and torch.equal(la(BATCH), before)
    assert la.log_marginal_likelihood() == evidence


@pytest.mark.parametrize("cls", EVERY)
def test_predictions_and_copies_after_a_gradient_of_the_evidence(cls):
    la = posterior(cls, "bert")
    before, log_prior = la(BATCH), torch.zeros(1, requires_grad=True)
    la.log_marginal_likelihood(log_prior.exp()).backward()
    assert log_prior.grad is not None and log_prior.grad != 0
    found = la(BATCH)
    assert not found.requires_grad and torch.equal(found, before)
    assert not la.predict(loader()).covariance.requires_grad
    assert torch.equal(copy.deepcopy(la)(BATCH), before)


@pytest.mark.parametrize("cls", EVERY)
def test_the_density_of_weights_is_that_of_the_samples(cls):
    """Weights drawn around a moved mean are as likely as those drawn around the MAP."""
    la = posterior(cls, "bert")
    generator = torch.Generator().manual_seed(0)
    at_map = la.sample(1, generator)[0]
    density, relative = la.log_prob(at_map), la.log_prob(at_map, normalized=False)
    before = la.mean.clone()
    la.recentre(precision=0.1)
    moved = la.sample(1, generator.manual_seed(0))[0]
    assert torch.equal(la.mean, before) and (moved - at_map).norm() > 1e-3
    assert torch.isclose(la.log_prob(moved), density)
    assert torch.isclose(la.log_prob(moved, normalized=False), relative)
    la.reset_mean()
    assert la.log_prob(at_map) == density != la.log_prob(moved)


@pytest.mark.parametrize("cls", EVERY)
def test_samples_and_their_density_have_the_calibrated_width(cls):
    la = posterior(cls, "bert")
    generator = torch.Generator().manual_seed(0)
    wide = la.sample(1, generator)[0]
    density, relative = la.log_prob(wide), la.log_prob(wide, normalized=False)
    variance = la.weight_variance()
    la.covariance_scale = 0.25
    narrow = la.sample(1, generator.manual_seed(0))[0]
    assert torch.allclose(narrow - la.mean, 0.5 * (wide - la.mean), rtol=1e-6)
    assert torch.isclose(la.log_prob(narrow, normalized=False), relative)
    assert torch.isclose(la.log_prob(narrow), density + la.n_params * math.log(2))
    assert torch.allclose(la.weight_variance(), variance / 4, rtol=1e-6)
    spread = torch.cat([std.flatten() for _, std in la.marginals().values()])
    assert torch.allclose(spread.square(), variance / 4, rtol=1e-6)
