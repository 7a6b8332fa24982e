"""What a last-layer Gaussian process refuses, and what is left of an earlier one."""

import copy
import io
import warnings

import pytest
import torch
from laplace.baselaplace import FunctionalLaplace
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch.utils.data import DataLoader

from laplace_lora import FullLoraLLLaplace, FunctionalLoraLLLaplace
from support.batches import LENGTHS, loader, split_rows, token_batch, validation
from support.models import base_model, excite, peft_model

BATCH = token_batch((4, 2, 6), seed=9)


def labelled(y):
    return DataLoader(split_rows(token_batch(LENGTHS) | {"labels": y}), batch_size=3)


def process(model=None, likelihood="classification"):
    return FunctionalLoraLLLaplace(model or peft_model("bert"), likelihood, 4, prior_precision=2.0)


def fitted(model=None):
    gp = process(model)
    gp.fit(loader())
    return gp


def answers(gp):
    return [*gp._glm_predictive_distribution(BATCH), gp.log_marginal_likelihood()]


def refusal(la, data, kind):
    with pytest.raises(kind) as caught:
        la.fit(data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("likelihood", "y", "kind", "said"),
    [
        ("classification", torch.tensor([0, 1, 2, -100, 0, 1, 2]), ValueError, "must lie in 0..2"),
        ("classification", torch.eye(7)[:, :3], ValueError, "one integer label per example"),
        ("classification", torch.full((7, 3), 1 / 3), ValueError, "one integer label per example"),
        ("regression", torch.zeros(7), ValueError, "give one target per output"),
        ("regression", torch.zeros(7, 1), ValueError, "give one target per output"),
        ("regression", torch.eye(7)[:, :3] / 0, FloatingPointError, r"infinite at rows [0, 1, 2]"),
    ],
)
def test_labels_are_refused_as_by_the_other_last_layers(likelihood, y, kind, said):
    model = peft_model("bert")
    found = refusal(process(model, likelihood), labelled(y), kind)
    assert said in found
    assert found == refusal(FullLoraLLLaplace(model, likelihood), labelled(y), kind)


def test_a_label_that_is_refused_is_named_by_its_batch():
    y = torch.zeros(7, 3)
    y[4, 1] = torch.nan
    message = "batch 1 of the training data: .* at rows \\[1\\] of the batch"
    with pytest.raises(FloatingPointError, match=message):
        process(likelihood="regression").fit(labelled(y))


class Stop(KeyboardInterrupt):
    """Stands for a user's."""


def test_an_interrupted_fit_leaves_the_earlier_process(monkeypatch):
    gp = fitted()
    expected, calls, kernel = answers(gp), [], FunctionalLaplace._kernel_batch

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise Stop
        return kernel(*args)

    monkeypatch.setattr(FunctionalLaplace, "_kernel_batch", interrupted)
    with pytest.raises(Stop):
        gp.fit(validation())
    assert all(map(torch.equal, answers(gp), expected))
    assert gp.n_data == len(LENGTHS)


@pytest.mark.parametrize(
    "data", [loader(lengths=(3, 2)), labelled(torch.full((7,), -100)), [{"input_ids": None}]]
)
def test_a_refused_fit_at_other_weights_leaves_the_earlier_process_to_its_own(data):
    gp = fitted()
    head = gp.features.source.head_tensors()
    expected, shared = answers(gp), copy.copy(gp)
    for tensor in head:
        tensor.mul_(2)
    with pytest.raises(ValueError):
        gp.fit(data)
    for tensor in head:
        tensor.div_(2)
    for la in (gp, shared):
        assert all(map(torch.equal, answers(la), expected))


def test_a_fit_leaves_copies_their_own_process():
    gp = fitted()
    expected, twin = answers(gp), copy.copy(gp)
    twin.fit(validation())
    assert all(map(torch.equal, answers(gp), expected))
    assert not torch.equal(answers(twin)[2], expected[2])


def change_adapter(model):
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.mul_(1.1)


def change_frozen(model):
    model.get_base_model().bert.embeddings.word_embeddings.weight.data.mul_(1.1)


def change_scaling(model):
    model.get_base_model().bert.encoder.layer[0].attention.self.query.scale_layer(2.0)


def change_head(model):
    next(p for n, p in model.named_parameters() if "classifier.modules_to_save" in n).data.mul_(2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_adapter, r"other weights, buffers, settings or scalings of '.*lora_B"),
        (change_frozen, r"other weights, buffers, settings or scalings of '.*word_embeddings"),
        (
            change_scaling,
            r"other weights, buffers, settings or scalings of '.*0.attention.self.query",
        ),
        (change_head, "a last layer with other weights"),
        (
            lambda model: model.float(),
            "in torch.float64, and this one is in torch.float32",
        ),
    ],
)
def test_the_state_of_a_model_at_other_weights_is_refused(change, said):
    state, model = fitted().state_dict(), peft_model("bert")
    change(model)
    gp = fitted(model)
    expected = answers(gp)
    with pytest.raises(ValueError, match=said):
        gp.load_state_dict(state)
    assert all(map(torch.equal, answers(gp), expected))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["query"], modules_to_save=["classifier"]),
        LoraConfig(target_modules=["query"], trainable_token_indices={"word_embeddings": [2, 3]}),
        IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
        VeraConfig(r=4, target_modules=["query"]),
    ],
)
def test_an_adapter_is_the_same_under_another_name(config, tmp_path):
    excite(get_peft_model(base_model("bert"), config)).save_pretrained(tmp_path)
    names = ("default", "0")  # layers have numbers, too
    first, model = (PeftModel.from_pretrained(base_model("bert"), tmp_path, n) for n in names)
    gp, again = fitted(first), process(model)
    again.load_state_dict(gp.state_dict())
    assert all(map(torch.equal, answers(again), answers(gp)))
    known = dict(first.named_parameters())
    changed = next(p for name, p in model.named_parameters() if name not in known)
    with torch.no_grad():
        changed.add_(0.1)
    with pytest.raises(ValueError, match="other weights, buffers, settings or scalings of"):
        again.load_state_dict(gp.state_dict())


@pytest.mark.parametrize("has_fewer", [True, False])
def test_the_state_of_another_transformer_is_refused(has_fewer):
    models = [peft_model("bert"), peft_model("bert")]
    encoder = models[has_fewer].get_base_model().bert.encoder
    encoder.layer = encoder.layer[:1]
    state = fitted(models[0]).state_dict()
    with pytest.raises(ValueError, match=r"another transformer: .* tensors called '.*layer\.1\."):
        process(models[1]).load_state_dict(state)


def test_states_of_earlier_versions_are_known_by_their_last_layer():
    gp, model = fitted(), peft_model("bert")
    state = gp.state_dict()
    del state["features"]
    again = process(model)
    again.load_state_dict(state)
    assert all(map(torch.equal, answers(again), answers(gp)))
    change_head(model)
    with pytest.raises(ValueError, match="a last layer with other weights"):
        again.load_state_dict(state)


def test_a_state_comes_back_from_a_file():
    gp, again, file = fitted(), process(), io.BytesIO()
    torch.save(gp.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=False))
    assert all(map(torch.equal, answers(again), answers(gp)))
    change_adapter(again.features.source)
    with pytest.raises(RuntimeError, match="have changed since"):
        again(BATCH)


def unmasked(lengths, **kwargs):
    batch = token_batch(lengths, **kwargs)
    del batch["attention_mask"]
    return batch


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_without_a_mask_is_refused(name):
    data = DataLoader(split_rows(unmasked(LENGTHS, side="left")), batch_size=3)
    model = peft_model(name)
    found = refusal(process(model), data, ValueError)
    assert "no 'attention_mask' says that it is padding" in found
    assert found == refusal(FullLoraLLLaplace(model, "classification"), data, ValueError)


def test_the_first_batch_of_several_examples_is_verified_as_well():
    data = [unmasked((4,)), unmasked((4, 6, 2), side="left")]
    with pytest.raises(ValueError, match="no 'attention_mask' says that it is padding"):
        process(peft_model("llama")).fit(data)


def test_a_model_that_counts_padding_is_pointed_out():
    with pytest.warns(UserWarning, match="answers a padded text otherwise"):
        process().fit(loader(side="left"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        process(peft_model("llama")).fit(loader(side="left"))


def test_there_is_no_evidence_before_a_fit():
    with pytest.raises(RuntimeError, match="has not been fitted"):
        process().log_marginal_likelihood()


@pytest.mark.parametrize("n_subset", [0, -1, 1.5, None])
def test_it_is_conditioned_on_a_positive_number_of_examples(n_subset):
    with pytest.raises(ValueError, match="n_subset must be a whole number, at least 1; got"):
        FunctionalLoraLLLaplace(peft_model("bert"), "classification", n_subset)


def test_dictionaries_of_something_else_are_refused():
    gp = fitted()
    before, state = answers(gp), gp.state_dict()
    for missing in (list(state), ["mu"]):
        with pytest.raises(ValueError, match=r"has no .*; load what a posterior's state_dict"):
            gp.load_state_dict({k: v for k, v in state.items() if k not in missing})
    assert all(map(torch.equal, before, answers(gp)))
