"""Tuning a prior by leave-one-out of the linearised base model."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification

from laplace_lora import FullLoraLaplace, FullLoraLLLaplace, KronLoraLaplace, LogitsModel
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.models.changes import twins
from laplace_lora.models.start import before_adapter
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.left_out.closer_fit import closer_fit
from laplace_lora.tuning.left_out.linear_model import LinearModel, without_own
from laplace_lora.tuning.left_out.report import LeaveOneOut
from laplace_lora.tuning.left_out.shared_inputs import standard_error
from laplace_lora.tuning.left_out.width_choice import GRID
from laplace_lora.tuning.validation.cache import scoring_of
from support.batches import loader, token_batch
from support.models import bert_config, peft_model
from support.posteriors import EVERY_CLASS, posterior
from support.preferences import reward_posterior

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)


def fitted(cls=KronLoraLaplace, name="bert", data=None, **kwargs):
    la = posterior(cls, name, fit=False, **kwargs)
    la.fit(loader(lengths=LENGTHS) if data is None else data)
    return la


def base_prediction(la):
    """Leave-one-out means of the base model, from Jacobians by `torch.func`, text by text."""
    model = copy.deepcopy(la.logits_model).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    weights = [p for p in model.parameters() if p.requires_grad]
    means, rows, labels = [], [], []
    for x in loader(batch_size=1, lengths=LENGTHS):
        f = model(x)[0]
        contrasts = f[1:] - f[0]
        for contrast in contrasts:
            gradients = torch.autograd.grad(contrast, weights, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
        means.append(contrasts.detach())
        labels.append(x["labels"])
    J, y = torch.stack(rows), torch.cat(labels)
    linear = LinearModel(J @ J.T, torch.stack(means), y, likelihood_of("classification"), True)
    target = la.state.loss
    return linear.leave_one_out(linear.fitted_like(target))[0].detach(), y


def score(la, precision, means, y):
    """Mean NLL of Gaussians with the posterior's width at the training texts."""
    la.prior_precision = precision
    batch = token_batch(LENGTHS)
    f, covariance = Predictor(la.fitted).readout_moments(batch, CONTRASTS)
    if la.fitted.leaves_examples_out:
        logits = F.pad(f, (1, 0))
        root = likelihood_of("classification").root(logits, y).transpose(0, 1)[:, :, 1:]
        covariance = without_own(covariance, root)
    return float(scoring_of(la.fitted, "quadrature", 0).nll(means, covariance, y).mean())


@pytest.mark.parametrize(
    "cls,name",
    [
        (KronLoraLaplace, "llama-lm"),
        (FullLoraLaplace, "bert"),
        (KronLoraLaplace, "gpt2"),
        (FullLoraLLLaplace, "gpt2"),
    ],
)
def test_the_choice_is_the_best_by_brute_force(cls, name):
    la = fitted(cls, name)
    means, y = base_prediction(la)
    la.optimize_prior_precision(method="loo")
    report, chosen = la.tuning.leave_one_out, float(la.prior_precision)
    assert report.prior_precision == pytest.approx(chosen)
    best = score(la, chosen, means, y)
    assert report.nll == pytest.approx(best, rel=1e-3)
    for factor in (0.03, 0.5, 0.9, 1.1, 2, 30):
        other = min(max(chosen * factor, 1e-4), 1e8)  # the ends of what is tried
        assert best <= score(la, other, means, y) + 2e-4


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
def test_every_class_has_it_as_its_default(cls, kwargs):
    la = fitted(cls, **kwargs)
    la.optimize_prior_precision()
    assert la.tuning.method == "loo"
    assert la.tuning.leave_one_out.nll <= la.tuning.leave_one_out.nll_map + 1e-9
    assert "leave-one-out" in str(la.tuning)


def test_order_batch_size_and_padding_change_nothing():
    chosen = []
    for data in (
        loader(lengths=LENGTHS),
        loader(batch_size=5, lengths=LENGTHS, pad_to=9),
        DataLoader(loader(lengths=LENGTHS).dataset, batch_size=4, shuffle=True),
    ):
        la = fitted(name="llama-lm", data=data)
        la.optimize_prior_precision()
        chosen.append(float(la.prior_precision))
    assert chosen[1:] == pytest.approx([chosen[0]] * 2, rel=2e-3)


def test_preference_pairs():
    la = reward_posterior()
    la.optimize_prior_precision()
    assert la.tuning.method == "loo"


def test_the_model_and_the_random_state_stay():
    la = fitted()
    before = {k: v.clone() for k, v in la.model.state_dict().items()}
    batches = list(loader(lengths=LENGTHS))  # a DataLoader draws a seed of its own
    torch.manual_seed(3)
    la.optimize_prior_precision(train_loader=batches)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)
    assert all(torch.equal(before[k], v) for k, v in la.model.state_dict().items())
    assert all(p.requires_grad for p in la.params)


def adapted(name, frozen=False, trained=("lora_B",), **kwargs):
    """A model whose adapter has learnt much, in part frozen."""
    model = peft_model(name, **kwargs).eval()
    for key, tensor in model.named_parameters():
        if any(part in key for part in (*trained, "magnitude")):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
            tensor.requires_grad_(not frozen)
    return model


@pytest.mark.parametrize("has_twin", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        partial(adapted, "llama-lm"),
        partial(adapted, "llama-lm", frozen=True),
        partial(adapted, "llama-lm", use_dora=True),
        partial(adapted, "llama-lm", frozen=True, use_dora=True, use_rslora=True),
        partial(
            adapted,
            "llama-lm",
            target_modules=["embed_tokens", "q_proj"],
            use_dora=True,
            trained=("lora_B", "lora_embedding_A"),
        ),
    ],
)
def test_before_an_adapter_the_base_model_answers(monkeypatch, make, has_twin):
    model = make()
    if not has_twin:
        monkeypatch.setattr(twins, "_has_twin", lambda model: False)
    batch = {k: v for k, v in token_batch().items() if k != "labels"}
    grads = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        trained = model(**batch).logits
        with before_adapter(model) as (twin, at_start):
            with at_start():
                answer = twin(**batch).logits
            torch.testing.assert_close(model(**batch).logits, trained, rtol=0, atol=0)
        assert [p.requires_grad for p in model.parameters()] == grads
        with model.disable_adapter():
            torch.testing.assert_close(answer, model(**batch).logits)
    assert (answer - trained).abs().max() > 1e-3


def test_a_model_without_a_twin_is_tuned_as_one_that_has_one(monkeypatch):
    """Both its own predictions and the base model's are read batch by batch."""
    expected, la = fitted(), fitted()
    expected.optimize_prior_precision(method="loo")
    monkeypatch.setattr(twins, "_has_twin", lambda model: False)
    before = {k: v.clone() for k, v in la.model.state_dict().items()}
    la.optimize_prior_precision(method="loo")
    assert all(torch.equal(before[k], v) for k, v in la.model.state_dict().items())
    torch.testing.assert_close(la.prior_precision, expected.prior_precision)


def test_without_the_training_data_it_says_so():
    la = fitted()
    la.merge([fitted()])  # whose data are at hand
    la.optimize_prior_precision()
    assert la.tuning.method == "loo"
    la.adopt(la.curvature, la.n_data, loader(lengths=LENGTHS))
    with pytest.warns(UserWarning, match="may be far too weak"):
        la.optimize_prior_precision()
    assert la.tuning.method == "marglik"
    assert "not at hand" in str(la.tuning)
    with pytest.raises(ValueError, match="needs the training data"):
        la.optimize_prior_precision(method="loo")


def test_data_of_another_fit_are_refused():
    la = fitted()
    with pytest.raises(ValueError, match="there are no examples: the loader is empty"):
        la.optimize_prior_precision(method="loo", train_loader=[])
    with pytest.raises(ValueError, match="7 examples, the fit saw 12"):
        la.optimize_prior_precision(method="loo", train_loader=loader())


@pytest.mark.parametrize("structure", [KronLoraLaplace, FullLoraLaplace])
def test_the_default_takes_no_other_data_either(tmp_path, structure):
    """The marginal likelihood, which needs none, would be another prior without a word."""
    la = structure(LogitsModel(peft_model("bert")), "classification")
    la.fit(loader())
    la.save_pretrained(tmp_path)
    again = structure.from_pretrained(la.logits_model, tmp_path)
    with pytest.raises(ValueError, match="12 examples, the fit saw 7"):
        again.optimize_prior_precision(train_loader=loader(lengths=LENGTHS))
    batch = token_batch(LENGTHS)
    for labels, message in ((batch["labels"].float(), "integer"), (9 + batch["labels"], "0..2")):
        with pytest.raises(ValueError, match=message):
            again.optimize_prior_precision(train_loader=[{**batch, "labels": labels}])
    assert again.tuning is None


def test_the_default_goes_on_where_the_data_are_used_up():
    class Stream(DataLoader):
        is_used_up = False

        def __iter__(self):
            return iter([]) if self.is_used_up else super().__iter__()

    data = Stream(loader(lengths=LENGTHS).dataset, batch_size=3)
    la = fitted(data=data)
    Stream.is_used_up = True
    with pytest.warns(UserWarning, match="is empty"):
        la.optimize_prior_precision()
    assert la.tuning.method == "marglik"
    assert "empty" in la.tuning.reason


def test_only_a_scalar():
    la = fitted()
    with pytest.raises(ValueError, match="chooses a scalar"):
        la.optimize_prior_precision(method="loo", prior_structure="layerwise")
    la.optimize_prior_precision(prior_structure="layerwise")
    assert la.tuning.method == "marglik"
    assert "no scalar" in la.tuning.reason


def test_loaded_with_the_training_data_given(tmp_path):
    la = fitted()
    la.optimize_prior_precision()
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    again.optimize_prior_precision(train_loader=loader(lengths=LENGTHS))
    assert float(again.prior_precision) == pytest.approx(float(la.prior_precision), rel=1e-5)


def test_copies_share_the_data():
    la = fitted()
    twin = copy.deepcopy(la)
    twin.optimize_prior_precision()
    la.optimize_prior_precision()
    assert float(twin.prior_precision) == float(la.prior_precision)


@pytest.mark.parametrize(
    "config,reason",
    [
        (LoraConfig(r=2, target_modules=["query"], init_lora_weights=False), "initialised with"),
        (LoraConfig(r=2, target_modules=["query"], init_lora_weights="olora"), "'olora'"),
    ],
)
def test_an_unknown_start_is_refused(config, reason):
    torch.manual_seed(0)
    model = get_peft_model(BertForSequenceClassification(bert_config()), config)
    la = KronLoraLaplace(LogitsModel(model), "classification")
    la.fit(loader(labels=2))
    la.optimize_prior_precision()
    assert la.tuning.method == "marglik"
    assert reason in la.tuning.reason
    with pytest.raises(ValueError, match=reason):
        la.optimize_prior_precision(method="loo")


def informative(n, features=3, seed=0):
    """Functions whose labels their features explain well."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, features, generator=generator, dtype=torch.float64)
    y = (X[:, 0] > 0).long()
    return LinearModel(
        X @ X.T, torch.zeros(n, 1).double(), y, likelihood_of("classification"), True
    )


def left_out_of(linear):
    return lambda mode: linear.leave_one_out(mode)[0]


def losses_of(linear):
    return lambda means: F.cross_entropy(F.pad(means, (1, 0)), linear.labels, reduction="none")


def closest(linear, mode):
    return closer_fit(linear, mode, left_out_of(linear), losses_of(linear))


def test_a_closer_fit_is_taken_where_it_is_clearly_better():
    linear = informative(60)
    left_out, losses = left_out_of(linear), losses_of(linear)
    loose = linear.mode(100.0)
    best = closest(linear, loose)
    assert best.precision < 50 and best.nll < loose.nll
    assert losses(left_out(best)).mean() < losses(left_out(loose)).mean()
    neighbours = [linear.mode(best.precision * factor) for factor in (0.5, 2)]
    assert all(losses(left_out(best)).mean() <= losses(left_out(m)).mean() for m in neighbours)
    close = linear.mode(best.precision)
    assert closest(linear, close) is close


def test_a_network_that_has_overfitted_is_not_fitted_more_closely():
    linear = informative(60)
    loose = linear.mode(100.0)
    assert closest(linear, loose) is not loose
    known = replace(loose, nll=0.59 * linear.nll(left_out_of(linear)(loose)))
    assert closest(linear, known) is known


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("fit", [2.0, 100.0])
def test_temperature_does_not_say_whether_a_closer_fit_is_taken(fit, scale):
    linear = informative(60)
    tempered = replace(linear, scale=scale)
    start = linear.mode(fit)
    found = closest(tempered, tempered.mode(fit * scale))  # the same functions
    torch.testing.assert_close(found.outputs, closest(linear, start).outputs)


@pytest.mark.parametrize("unit", [0.01, 100.0])
def test_the_unit_of_a_regression_does_not_say_whether_a_closer_fit_is_taken(unit):
    linear, losses = noisy_regression(1.0)
    expected = closer_fit(linear, linear.mode(200.0), left_out_of(linear), losses)
    assert expected.precision < 200
    linear, losses = noisy_regression(unit)
    found = closer_fit(linear, linear.mode(200.0 / unit**2), left_out_of(linear), losses)
    torch.testing.assert_close(found.outputs / unit, expected.outputs)


def noisy_regression(unit):
    """A linear model of targets in some unit, and what its predictions lose."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    y = unit * (X[:, :1] + torch.randn(60, 1, generator=generator, dtype=torch.float64))
    likelihood = likelihood_of("regression")
    linear = LinearModel(X @ X.T, 0 * y, y, likelihood, False, 1 / unit**2)
    scoring = likelihood.scoring(Link("quadrature"), unit)
    return linear, lambda means: scoring.nll(means, means.new_zeros(60, 1, 1), y)


def test_labels_that_features_do_not_explain_are_not_fitted_more_closely():
    linear = informative(60)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    linear = replace(linear, labels=linear.labels[shuffled])
    mode = linear.mode(100.0)
    assert closest(linear, mode) is mode


def test_an_underfitted_posterior_moves_and_says_so(monkeypatch):
    monkeypatch.setattr(
        "laplace_lora.tuning.left_out.leave_one_out.closer_fit",
        lambda linear, *others: linear.mode(0.1),
    )
    la = fitted()
    la.optimize_prior_precision()
    report, shift = la.tuning.leave_one_out.recentring, la.state.settings.shift
    assert report.nll_after < report.nll_before
    assert "recentred" in str(la.tuning)
    la.recentre(report.precision)
    torch.testing.assert_close(la.state.settings.shift, shift, rtol=1e-4, atol=1e-7)
    la.optimize_prior_precision(recentre=False)
    assert la.state.settings.shift is None


def test_of_many_examples_some_are_looked_at(monkeypatch):
    whole = fitted()
    whole.optimize_prior_precision()
    monkeypatch.setattr("laplace_lora.tuning.left_out.examples.ROWS", 2 * len(LENGTHS) - 1)
    monkeypatch.setattr("laplace_lora.tuning.left_out.examples.EXAMPLES", 9)
    monkeypatch.setattr("laplace_lora.tuning.left_out.examples.FEWEST", 3)
    chosen = []
    for batch_size in (12, 5, 1):
        la = fitted(data=loader(batch_size, lengths=LENGTHS))
        la.optimize_prior_precision()
        assert la.tuning.leave_one_out.examples == 9
        chosen.append(float(la.prior_precision))
    assert chosen[1:] == pytest.approx(chosen[:1] * 2, rel=2e-3)
    assert la.tuning.leave_one_out.nll != pytest.approx(whole.tuning.leave_one_out.nll, rel=1e-3)
    monkeypatch.setattr("laplace_lora.tuning.left_out.examples.FEWEST", 10)
    la.optimize_prior_precision()
    assert "outputs are too many" in la.tuning.reason


def test_it_says_where_no_width_helps():
    figures = {"nll_map": 0.5, "nll": 0.4, "standard_error": 0.02, "base_precision": 1.0}
    wide = LeaveOneOut(3.0, examples=7, **figures)
    assert not wide.is_widthless and "0.500 -> 0.400 with the posterior's width" in str(wide)
    none = LeaveOneOut(float(GRID[-1]), examples=7, **figures)
    assert none.is_widthless and "predictions are those of the mean alone" in str(none)
    unclear = LeaveOneOut(float(GRID[-1]), examples=7, is_unclear=True, **figures)
    assert "± 0.020), as wide as is tried and not clearly better, so it gets none" in str(unclear)


def test_of_a_single_example_it_states_no_standard_error():
    figures = {"nll_map": 0.5, "nll": 0.4, "base_precision": 1.0}
    some = LeaveOneOut(3.0, standard_error=0.02, examples=7, **figures)
    assert "(difference ± 0.020)" in str(some)
    alone = LeaveOneOut(3.0, standard_error=standard_error(torch.ones(1)), examples=1, **figures)
    assert "0.500 -> 0.400 with the posterior's width" in str(alone) and "±" not in str(alone)
