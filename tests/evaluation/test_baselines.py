"""Baselines: each is what its definition says, and leaves the model as it was."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.evaluation import (
    MAP,
    LoraEnsemble,
    MCDropout,
    TemperatureScaling,
    TrainingFreeBayes,
    diagonal_laplace,
    evaluate,
    last_layer_laplace,
)
from laplace_lora.likelihoods.language_modeling import IGNORED
from support.batches import LENGTHS, loader, token_batch
from support.models import TARGETS, base_model, excite, peft_model
from support.preferences import half_of, pair_batch
from support.references import assert_near
from support.threads import in_threads
from support.tokens import tagged_batch, tagged_loader, tagger

BATCH = token_batch((3, 5, 4))


def state(model):
    modes = [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    return modes, trainable, torch.random.get_rng_state().tolist()


def ensemble_model():
    """Two adapters in one model; the second is active."""
    model = peft_model("bert")
    config = model.peft_config["default"]
    model.add_adapter("second", config)
    model.set_adapter("second")
    excite(model, 0.5)
    return model.to(torch.float64)


def test_map_is_the_softmax_of_the_model_without_dropout():
    model = peft_model("bert").train()
    before = state(model)
    p = MAP(model)(BATCH)
    assert state(model) == before
    assert_near(p, LogitsModel(model.eval())(BATCH).softmax(-1).detach())
    answers = MAP(peft_model("llama-lm"), TARGETS)(BATCH)
    assert answers.shape == (3, len(TARGETS))


def test_the_temperature_is_the_best_on_the_validation_set():
    model = peft_model("bert")
    batch = token_batch(LENGTHS)
    logits = MAP(model).logits(batch)
    y = batch["labels"] = logits.argmax(-1)
    y[0] = logits[0].argmin()
    scaled = TemperatureScaling(model, [batch])
    losses = [
        F.cross_entropy(logits / t, y).item()
        for t in (scaled.temperature, 0.98 * scaled.temperature, 1.02 * scaled.temperature)
    ]
    assert losses[0] == min(losses) and abs(math.log(scaled.temperature)) < 4.9
    assert_near(scaled(BATCH), (MAP(model).logits(BATCH) / scaled.temperature).softmax(-1), 1e-9)
    pairs = [({k: v for k, v in batch.items() if k != "labels"}, y)]
    assert TemperatureScaling(model, pairs).temperature == pytest.approx(scaled.temperature)
    with pytest.raises(ValueError, match="empty"):
        TemperatureScaling(model, [])


def test_temperature_scaling_reads_the_labels_under_their_name():
    model, batch = peft_model("bert"), token_batch(LENGTHS)
    named = {k: v for k, v in batch.items() if k != "labels"} | {"answer": batch["labels"]}
    found = TemperatureScaling(model, [named], label_key="answer").temperature
    assert found == TemperatureScaling(model, [batch]).temperature
    with pytest.raises(ValueError, match="a batch has no 'labels'"):
        TemperatureScaling(model, [named])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_temperature_scaling_takes_integers_of_any_size_and_no_fractions(dtype):
    model, batch = peft_model("bert"), token_batch(LENGTHS)
    given = [{**batch, "labels": batch["labels"].to(dtype)}]
    if dtype.is_floating_point:
        with pytest.raises(ValueError, match="needs one integer label per example"):
            TemperatureScaling(model, given)
        return
    scaled = TemperatureScaling(model, given).temperature
    assert scaled == TemperatureScaling(model, [batch]).temperature


def test_a_perfect_model_gets_a_small_temperature():
    model = LogitsModel(peft_model("bert"))
    batch = token_batch(LENGTHS)
    batch["labels"] = model(batch).argmax(-1)
    assert TemperatureScaling(model, [batch]).temperature < math.exp(-2)


def test_the_temperature_of_a_token_classifier_is_the_best_of_its_labelled_tokens():
    model, batch = tagger(), tagged_batch()
    logits = MAP(model).logits(batch)
    y = batch["labels"]
    is_labelled = y != IGNORED
    y[is_labelled] = logits.argmax(-1)[is_labelled]
    y[0, 1] = logits[0, 1].argmin()
    batch["labels"] = torch.where(batch["attention_mask"] == 0, 0, y)  # padding never counts
    scaled = TemperatureScaling(model, tagged_loader(batch=batch))
    losses = [
        F.cross_entropy(logits[is_labelled] / t, y[is_labelled]).item()
        for t in (scaled.temperature, 0.98 * scaled.temperature, 1.02 * scaled.temperature)
    ]
    assert losses[0] == min(losses) and abs(math.log(scaled.temperature)) < 4.9
    real = batch["attention_mask"].bool()
    assert_near(scaled(batch)[real], (logits / scaled.temperature).softmax(-1)[real], 1e-9)
    with pytest.raises(ValueError, match="no token of the validation loader has a label"):
        TemperatureScaling(model, [{**batch, "labels": torch.full_like(y, IGNORED)}])
    with pytest.raises(ValueError, match="needs one integer label per token"):
        TemperatureScaling(model, [{**batch, "labels": y[:, 0]}])


@pytest.mark.parametrize("make", [MAP, MCDropout])
def test_padding_of_token_classifiers_has_no_probabilities(make):
    """So that it enters no score, even where no label tells it apart."""
    model, batch = tagger(lora_dropout=0.1), tagged_batch()
    padding = batch["attention_mask"] == 0
    p = make(model)(batch)
    assert not p[padding].any()
    assert_near(p[~padding].sum(-1), torch.ones(int((~padding).sum())), 1e-9)
    elsewhere = {**batch, "labels": torch.zeros_like(batch["labels"])}
    report = evaluate(make(model), [batch], ood_loader=[elsewhere], bootstrap=2)
    assert len(report.ood_uncertainty) == int((~padding).sum())
    assert len(report.probs) == int((batch["labels"] != IGNORED).sum())


def test_of_pairs_the_temperature_divides_the_difference_of_rewards():
    model, pairs = peft_model("llama", num_labels=1), pair_batch()
    with torch.no_grad():
        halves = [model.eval()(**half_of(pairs, side)).logits for side in ("chosen", "rejected")]
    difference = (halves[0] - halves[1])[:, 0]
    wins = difference > 0
    wins[difference.abs().argmin()] ^= True
    pairs["labels"] = wins.long()
    scaled = TemperatureScaling(model, [pairs])
    losses = [
        -F.logsigmoid(torch.where(wins, difference, -difference) / t).mean().item()
        for t in (scaled.temperature, 0.98 * scaled.temperature, 1.02 * scaled.temperature)
    ]
    assert losses[0] == min(losses) and abs(math.log(scaled.temperature)) < 4.9
    assert_near(scaled(pairs)[:, 1], (difference / scaled.temperature).sigmoid(), 1e-9)


def test_dropout_of_the_adapter_alone_is_sampled():
    model = peft_model("bert")
    before = state(model)
    dropout = MCDropout(model, n_samples=3)
    p = dropout(BATCH)
    assert state(model) == before
    assert torch.equal(p, dropout(BATCH))
    assert (p - MAP(model)(BATCH)).abs().max() > 1e-4
    assert (p - MCDropout(model, n_samples=3, seed=1)(BATCH)).abs().max() > 1e-6
    # Averages of more samples lie closer together.
    many = [MCDropout(model, n_samples=200, seed=s)(BATCH) for s in (0, 1)]
    few = [MCDropout(model, n_samples=2, seed=s)(BATCH) for s in (0, 1)]
    assert (many[0] - many[1]).norm() < (few[0] - few[1]).norm()


def test_variants_that_ask_the_layer_are_sampled():
    """DoRA's dropout is on where the layer trains."""
    model = peft_model("bert", use_dora=True)
    before = state(model)
    assert (MCDropout(model, n_samples=3)(BATCH) - MAP(model)(BATCH)).abs().max() > 1e-5
    assert state(model) == before


def test_monteclora_draws_weights_beside_its_dropout():
    model = peft_model("bert")
    next(m for m in model.modules() if hasattr(m, "lora_A")).lora_monteclora_sampler = {}
    with pytest.raises(ValueError, match="MonteCLoRA's, which draws weights"):
        MCDropout(model)


def test_no_samples_are_refused():
    model = peft_model("bert")
    with pytest.raises(ValueError, match="n_samples must be a whole number, at least 1; got 0"):
        MCDropout(model, n_samples=0)
    with pytest.raises(ValueError, match="n_samples must be a whole number, at least 1; got 0"):
        TrainingFreeBayes(model, [BATCH], n_samples=0)


def test_dropout_is_off_again_after_an_error():
    model = peft_model("bert").train()
    before = state(model)
    with pytest.raises(ValueError, match="has positions for 32"):
        MCDropout(model)({"input_ids": torch.zeros(1, 99, dtype=torch.long)})
    assert state(model) == before


def test_an_adapter_without_dropout_is_refused():
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=0.0)
    with pytest.raises(ValueError, match="without dropout"):
        MCDropout(get_peft_model(base_model("bert"), config))


def test_the_dropout_of_an_idle_adapter_is_nothing_to_sample():
    plain, other = (
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=share)
        for share in (0.0, 0.5)
    )
    model = get_peft_model(base_model("bert"), plain)
    model.add_adapter("other", other)
    with pytest.raises(ValueError, match="without dropout"):
        MCDropout(model)
    model.set_adapter("other")
    assert MCDropout(model, n_samples=2)(BATCH).shape == (3, 3)


def test_an_ensemble_averages_its_adapters_probabilities():
    model = ensemble_model()
    before = state(model)
    p = LoraEnsemble(model)(BATCH)
    assert state(model) == before and model.active_adapter == "second"
    members = []
    for name in ("default", "second"):
        model.set_adapter(name)
        members.append(LogitsModel(model.eval())(BATCH).softmax(-1).detach())
    assert (members[0] - members[1]).abs().max() > 1e-3
    assert_near(p, (members[0] + members[1]) / 2)


def test_an_ensemble_restores_the_active_adapter_after_an_error():
    model = ensemble_model()
    with pytest.raises(ValueError, match="has positions for 32"):
        LoraEnsemble(model)({"input_ids": torch.zeros(1, 99, dtype=torch.long)})
    assert model.active_adapter == "second"


def test_an_ensemble_leaves_several_active_adapters_active():
    lora = LoraConfig(r=2, target_modules=["query"])  # PEFT has one trained head at a time
    model = get_peft_model(base_model("bert"), lora).double()
    model.add_adapter("second", lora)
    model.base_model.set_adapter(["default", "second"])
    LoraEnsemble(model)(BATCH)
    assert list(model.active_adapters) == ["default", "second"]


def test_an_ensemble_switches_adapters_for_no_other_thread():
    model = ensemble_model().eval()
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    ensemble, before = LoraEnsemble(la.logits_model), state(model)
    jobs = [lambda: ensemble(BATCH), lambda: ensemble(BATCH), lambda: la(BATCH).detach()]
    expected = [job() for job in jobs]
    results, errors = in_threads(jobs)
    assert not errors, errors[0]
    for mine, alone in zip(results, expected, strict=True):
        assert all(torch.equal(result, alone) for result in mine)
    assert state(model) == before and model.active_adapter == "second"


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_adapters_of_a_model_without_a_twin_are_switched_in_place():
    model = ensemble_model()
    expected, before = LoraEnsemble(model)(BATCH), state(model)
    model.base_model.model.bert.encoder.compile(backend="eager")
    assert_near(LoraEnsemble(model)(BATCH), expected)
    assert state(model) == before and model.active_adapter == "second"


def test_an_ensemble_refuses_merged_adapters():
    """PEFT would take them out of the base model, for good."""
    model = ensemble_model()
    ensemble = LoraEnsemble(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base model; unmerge"):
        ensemble(BATCH)


@pytest.mark.parametrize("names", [None, ["default"], ["default", "third"], ["default", "default"]])
def test_an_ensemble_of_fewer_than_two_is_refused(names):
    model = ensemble_model() if names and "third" in names else peft_model("bert")
    with pytest.raises(ValueError, match="two different adapters or more"):
        LoraEnsemble(model, names)


@pytest.mark.parametrize("make", [last_layer_laplace, diagonal_laplace])
def test_the_cheaper_posteriors_come_tuned(make):
    la = make(peft_model("bert"), loader())
    by_hand = type(la)(la.logits_model, "classification")
    by_hand.fit(loader())
    by_hand.optimize_prior_precision(method="loo")
    assert float(la.prior_precision) == pytest.approx(float(by_hand.prior_precision), rel=1e-3)
    assert la.prior_precision != 1
    report = evaluate(la.predict, loader())
    assert report.mutual_information.shape == (len(LENGTHS),)
