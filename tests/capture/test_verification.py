"""The first batch is verified: what was inferred about a model, against autograd and the model.

Each kind of wrong answer is provoked, with its own fix switched off where there is one; without the
check it goes unnoticed.
"""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from laplace_lora import (
    DiagLoraLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraGGN,
)
from laplace_lora.adapters import discovery
from laplace_lora.models import score_head
from laplace_lora.models.changes.narrowing import last_true
from laplace_lora.models.changes.thread_hooks import OwnHooks
from laplace_lora.models.inputs.positions import PositionRule, real_positions
from support.batches import loader, token_batch
from support.models import TARGETS, base_model, bert_config, excite, llama_config, peft_model
from support.references import assert_near, looped_jacobians

BATCH = token_batch((6, 3, 5, 4))
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()


class Net(nn.Module):
    """A layer, and a way in which it is used."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        self.use = use

    def forward(self, x):
        return self.last(self.use(self.first, x))


def also_functional(layer, x):
    return layer(x) + F.linear(torch.sin(x), layer.weight)


def only_functional(layer, x):
    layer(x)
    return F.linear(x, layer.weight, layer.bias)


def centred(layer, x):
    h = layer(x).tanh()
    return h - h.mean(0)


def routed(layer, x):
    """By the mean of the batch, through which no gradient flows."""
    return layer(x) if layer(x).mean() > 0.1 else layer(-x)


def silently(model, batch, **options):
    """What the library would have said without the check."""
    LoraGGN(model, "classification", verify=False, **options).jacobians(batch)


@pytest.mark.parametrize("use", [also_functional, only_functional])
def test_a_tensor_used_in_a_second_place_is_refused_by_name(use):
    net = Net(use).eval()
    net.first.bias.requires_grad_(False)
    silently(net, X)
    with pytest.raises(RuntimeError, match=r"'first\.weight'.*(second place|no gradient passes)"):
        LoraGGN(net, "classification").jacobians(X)
    jacobians, _ = LoraGGN(net, "classification", uncovered="diag").jacobians(X)
    rows = [torch.func.jacrev(lambda w, x=x: call(net, w, x))(trainable(net)) for x in X]
    expected = torch.stack([torch.cat([J.flatten(1) for J in row.values()], 1) for row in rows])
    assert_near(jacobians, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("use", [also_functional, only_functional])
def test_float16_is_no_excuse_for_a_second_place(use, scale, autocast):
    """Its rounding is allowed for, at whatever scale gradients pass backward."""
    net = Net(use).to(torch.float32 if autocast else torch.float16).eval()
    net.first.bias.requires_grad_(False)
    with torch.no_grad():
        net.last.weight.mul_(scale)
    x = X.to(net.last.weight)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        silently(net, x)
        with pytest.raises(RuntimeError, match=r"'first\.weight'.*(second place|no gradient pass)"):
            LoraGGN(net, "classification").jacobians(x)


def trainable(net):
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def call(net, weights, x):
    return torch.func.functional_call(net, weights, (x[None],))[0]


@pytest.mark.parametrize("use", [centred, routed])
@pytest.mark.parametrize("uncovered", ["error", "diag"])
def test_a_model_that_mixes_its_examples_is_refused(use, uncovered):
    net = Net(use).eval()
    silently(net, X)
    with pytest.raises(RuntimeError, match=r"mixes the examples|show.* at others|differs from"):
        LoraGGN(net, "classification", uncovered=uncovered).jacobians(X)


def barely_mixed(layer, x):
    """Outputs are 0.2 % off in a batch, and gradients as much as outputs are small."""
    h = layer(x)
    return h + 2e-3 * h.mean(0)


def test_single_precision_is_no_excuse_for_mixing_examples():
    net = Net(barely_mixed).float().eval()
    silently(net, X.float())
    with pytest.raises(RuntimeError, match=r"mixes the examples|show.* at others"):
        LoraGGN(net, "classification").jacobians(X.float())


def drawn(layer, x):
    """As attention does that samples keys in evaluation mode."""
    return F.dropout(layer(x), 0.5, training=True)


def test_a_model_that_draws_at_random_is_called_so():
    net = Net(drawn).eval()
    silently(net, X)
    with pytest.raises(RuntimeError, match="outputs are random: the same example has others"):
        LoraGGN(net, "classification").jacobians(X)


def test_batch_norms_without_running_statistics_are_refused():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    ).double()
    net[1].requires_grad_(False)
    with pytest.raises(RuntimeError, match="examples"):
        DiagLoraLaplace(net, "classification").fit(rows_loader(X))


def rows_loader(x, batches=None):
    data = torch.utils.data.TensorDataset(x, torch.arange(len(x)) % 3)
    return torch.utils.data.DataLoader(data, batch_sampler=batches or [list(range(len(x)))])


@pytest.mark.parametrize("place", ["fit", "prediction"])
def test_the_first_batch_of_several_examples_is_verified_too(place):
    """A model that mixes its examples mixes none of a single one with others."""
    net = Net(centred).eval()
    la = DiagLoraLaplace(net, "classification")
    la.fit(rows_loader(X, [[0], [1]]))
    with pytest.raises(RuntimeError, match=r"mixes the examples|show.* at others"):
        la(X) if place == "prediction" else la.fit(rows_loader(X, [[0], [1, 2]]))


def test_single_examples_are_verified_once(monkeypatch):
    calls = []
    check = "laplace_lora.curvature.recording.verify_outputs"
    monkeypatch.setattr(check, lambda *args: calls.append(1))
    la = KronLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader(batch_size=1))
    assert len(calls) == 1
    la(BATCH)
    la(BATCH)
    assert len(calls) == 2


@pytest.mark.parametrize("tokens", [4, 6])
def test_a_layer_that_sees_tokens_first_is_refused_at_every_batch_size(tokens):
    """XLNet's layers receive (tokens, batch, features): with 4 tokens, the shape of 4 examples."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24, num_labels=3, pad_token_id=0
    )
    lora = LoraConfig(r=2, target_modules=["layer_1", "layer_2"])
    base = XLNetForSequenceClassification(config)
    model = LogitsModel(excite(get_peft_model(base, lora)).double()).eval()
    batch = token_batch((tokens,) * 4)
    with pytest.raises(RuntimeError, match=r"the batch first|first dimension"):
        LoraGGN(model, "classification").jacobians(batch)
    jacobians, _ = LoraGGN(model, "classification", uncovered="diag").jacobians(batch)
    assert_near(jacobians, looped_jacobians(model, batch))


def test_a_single_example_hides_no_dimension():
    """In a batch of one every first dimension of one could count the examples."""
    net = Net(lambda layer, x: layer(x[None])[0]).eval()
    for batch in (X, X[:1]):
        with pytest.raises(RuntimeError, match=r"'first' received .* the batch first"):
            LoraGGN(net, "classification").jacobians(batch)
    silently(net, X[:1])


def test_a_replaced_output_is_noticed_without_its_fix(monkeypatch):
    model = get_peft_model(
        Net(lambda layer, x: layer(x)), LoraConfig(r=2, target_modules=["first"])
    )
    model = excite(model).double().eval()
    lora_B = model.get_submodule("base_model.model.first.lora_B.default")
    lora_B.register_forward_hook(lambda module, args, output: torch.sin(output) * 3.0)
    LoraGGN(model, "classification").jacobians(X)
    on_output = OwnHooks.on_output
    monkeypatch.setattr(OwnHooks, "on_output", lambda own, m, hook, first: on_output(own, m, hook))
    silently(model, X)
    with pytest.raises(RuntimeError, match=r"lora_B.*is not autograd's"):
        LoraGGN(model, "classification").jacobians(X)


def tied_llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tie_word_embeddings=True)).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in name or "q_proj" in name)
    return LogitsModel(model, target_ids=TARGETS).eval()


def test_tied_embeddings_are_right_or_refused(monkeypatch):
    model = tied_llama()
    with pytest.raises(ValueError, match=r"embed_tokens.*shared by several modules"):
        LoraGGN(model, "classification")
    jacobians, _ = LoraGGN(model, "classification", uncovered="diag").jacobians(BATCH)
    assert_near(jacobians, looped_jacobians(model, BATCH))
    monkeypatch.setattr(discovery, "_holders", lambda model: Counter())
    silently(model, BATCH)
    with pytest.raises(RuntimeError, match=r"embed_tokens.*second place"):
        LoraGGN(model, "classification").jacobians(BATCH)


def test_an_embedding_that_peft_ties_to_the_head_is_right_or_refused():
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    adapted = excite(get_peft_model(base, lora)).double().eval()
    model = LogitsModel(adapted, target_ids=TARGETS).eval()
    with pytest.raises(ValueError, match=r"embed_tokens.*shared by several modules"):
        LoraGGN(model, "classification")
    jacobians, _ = LoraGGN(model, "classification", uncovered="diag").jacobians(BATCH)
    assert_near(jacobians, looped_jacobians(model, BATCH))


def roberta_decoder():
    torch.manual_seed(0)
    base = RobertaForCausalLM(bert_config(RobertaConfig, is_decoder=True))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))


def always_supplied(rule, inputs, *args):
    inputs["position_ids"] = real_positions(inputs["attention_mask"])


def test_wrong_positions_are_noticed_without_their_fix(monkeypatch):
    model = excite(roberta_decoder()).double().eval()
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    LoraGGN(wrapped, "classification").jacobians(BATCH)
    monkeypatch.setattr(PositionRule, "apply", always_supplied)
    silently(wrapped, BATCH)
    with pytest.raises(RuntimeError, match="differ from those of the model's own forward pass"):
        LoraGGN(wrapped, "classification").jacobians(BATCH)


def prompted(task="SEQ_CLS", name="llama"):
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    return excite(get_peft_model(base_model(name), config), 0.5).double().eval()


def test_a_wrong_token_is_noticed_without_its_fix(monkeypatch):
    wrapped = LogitsModel(prompted()).eval()
    options = {"uncovered": "diag"}
    with pytest.warns(UserWarning, match="answers a padded text otherwise"):
        LoraGGN(wrapped, "classification", **options).jacobians(BATCH)

    def of_the_users_ids(ids, config):
        return last_true(BATCH["input_ids"] != 0)

    monkeypatch.setattr(score_head, "last_unpadded", of_the_users_ids)
    with pytest.raises(RuntimeError, match=r"own forward pass|alone, example"):
        LoraGGN(wrapped, "classification", **options).jacobians(BATCH)


def test_a_head_that_would_read_padding_is_refused():
    """As a decoder's configuration may name another token than texts are padded with."""
    model = peft_model("llama")
    config = model.get_base_model().config
    padded, left = token_batch((2, 4)), token_batch((2, 4), side="left")
    wrapped = LogitsModel(model).eval()
    expected = wrapped(padded)
    config.pad_token_id = 7
    with pytest.raises(ValueError, match=r"at one of its padding tokens.*pad_token_id, 7"):
        wrapped(padded)
    assert wrapped(left).shape == expected.shape  # the last token is a text's end there
    alone = {key: value[:1, :2] for key, value in padded.items() if value.ndim == 2}
    torch.testing.assert_close(wrapped(alone), expected[:1])


def test_every_fit_is_verified_once_and_predictions_of_loaded_posteriors(monkeypatch, tmp_path):
    calls = []
    check = "laplace_lora.curvature.recording.verify_outputs"
    monkeypatch.setattr(check, lambda *args: calls.append(1))
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader(batch_size=2))
    la(BATCH)
    assert len(calls) == 1
    la.fit(loader(batch_size=2))
    assert len(calls) == 2
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    again(BATCH)
    again(BATCH)
    assert len(calls) == 3
    KronLoraLaplace(model, "classification", backend_kwargs={"verify": False}).fit(loader())
    assert len(calls) == 3


def test_a_last_layer_is_verified_in_the_precision_of_its_transformer(monkeypatch):
    """Its head is a copy in single precision."""
    dtypes = []
    check = "laplace_lora.curvature.recording.verify_outputs"
    monkeypatch.setattr(check, lambda *args: dtypes.append(args[4]))
    la = KronLoraLLLaplace(peft_model("bert", dtype=torch.bfloat16), "classification")
    la.fit(loader())
    assert dtypes == [torch.bfloat16]


def test_a_last_layer_at_other_weights_is_not_the_models_own():
    la = KronLoraLLLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    la.engine.recording.is_verified = False
    with torch.no_grad():
        la.parts.last_layer.head.weight.mul_(2)
    la.backend.jacobians(BATCH)
    assert la.engine.recording.is_verified
