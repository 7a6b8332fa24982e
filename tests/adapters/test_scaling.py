"""IA³ and VeRA: their vectors' gradients come from the passes that run anyway, and are exact."""

import pytest
import torch
from peft import IA3Config, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BertForMultipleChoice

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.adapters.diagonal_maps import WholeTensor
from laplace_lora.adapters.scaling_maps import IA3Map, VeraMap
from laplace_lora.likelihoods.roots import softmax_root
from laplace_lora.linalg.factors import DiagonalFactor
from support.batches import loader, token_batch
from support.models import base_model, bert_config, checkpoint_activations, excite, resnet
from support.references import assert_near, explicit_ggn, looped_jacobians
from support.rows_apart import choice_batch

EXACT = 1e-10
LAYERS = {  # of attention, and feedforward
    "bert": (["query", "value"], ["output.dense"], ["classifier"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"], ["score"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"], ["score"]),
    "albert": (["query", "value"], ["ffn_output"], ["classifier"]),
    "choices": (["query", "value"], ["output.dense"], ["classifier"]),
}
BASES = {
    "albert": lambda: AlbertForSequenceClassification(
        bert_config(AlbertConfig, embedding_size=8, num_hidden_layers=3, num_labels=3)
    ),
    "choices": lambda: BertForMultipleChoice(bert_config()),
}


def config_of(kind, name):
    attention, feedforward, heads = LAYERS[name]
    options = {
        "target_modules": attention + feedforward,
        "fan_in_fan_out": name == "gpt2",
        "modules_to_save": heads,
    }
    if kind == "ia3":
        return IA3Config(feedforward_modules=feedforward, **options)
    return VeraConfig(r=5, vera_dropout=0.1, **options)


def adapted(kind, name, dtype=torch.float64):
    torch.manual_seed(0)
    base = BASES[name]() if name in BASES else base_model(name)
    model = excite(get_peft_model(base, config_of(kind, name))).to(dtype)
    with torch.no_grad():
        for key, vector in model.named_parameters():
            if "ia3_l" in key:
                vector.add_(1).flatten()[:2] = 0  # what is multiplied by zero has a gradient, too
    return LogitsModel(model).eval()


def engine_of(model, whole=False, **options):
    """Return an engine, with every vector as a whole tensor if asked for: the plain way."""
    backend = LoraGGN(model, "classification", uncovered="diag", **options)
    if whole:
        vectors = [i for i, m in enumerate(backend.maps) if isinstance(m, IA3Map | VeraMap)]
        backend.engine.recording.cover_whole(vectors)
    return backend


def tolerance_of(name):
    return 1e-6 if name == "llama" else EXACT  # normalises in single precision, whatever its dtype


def kinds(backend):
    return {type(m) for m in backend.maps if m.is_diagonal}


@pytest.mark.filterwarnings("ignore:the model itself answers a padded text otherwise")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_jacobians_and_diagonals_equal_autograd_of_each_example(kind, name, side):
    model = adapted(kind, name)
    batch = token_batch((4, 2, 5), pad_to=7, side=side)
    backend = engine_of(model, factor_rank=8)
    jacobians, f = backend.jacobians(batch)
    expected, tolerance = looped_jacobians(model, batch), tolerance_of(name)
    sizes = [block.parameter.numel() for block in backend.blocks]
    assert_near(jacobians.split(sizes, -1), expected.split(sizes, -1), tolerance)
    assert kinds(backend) == {IA3Map if kind == "ia3" else VeraMap}
    _, kron = backend.kron(batch, batch["labels"], N=3)
    rows = torch.einsum("knc,ncp->knp", softmax_root(f), expected).square().sum((0, 1))
    for factors, part in zip(kron.kfacs, rows.split(sizes), strict=True):
        if isinstance(factors[0], DiagonalFactor):
            assert_near(factors[0].sums, part, tolerance)
    plain = engine_of(model, whole=True)
    assert_near(plain.jacobians(batch)[0], jacobians, tolerance)
    assert kinds(plain) == {WholeTensor}


@pytest.mark.parametrize("name", ["albert", "choices"])
@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_layers_with_several_calls_or_rows_of_an_example(kind, name):
    model, batch = adapted(kind, name), token_batch((4, 2, 5))
    if name == "choices":
        batch = choice_batch()
    backend = engine_of(model)
    assert_near(backend.jacobians(batch)[0], looped_jacobians(model, batch), EXACT)
    assert WholeTensor not in kinds(backend)


@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_exact_posteriors_stay_exact(kind):
    model = adapted(kind, "bert")
    ggn = sum(explicit_ggn(model, batch) for batch in loader()).detach()
    full = FullLoraLaplace(model, "classification", uncovered="diag")
    full.fit(loader())
    delta = torch.full((len(ggn),), 2.0, dtype=ggn.dtype)
    batch = token_batch((3, 5), seed=4)
    J = looped_jacobians(model, batch)
    full.prior_precision = 2.0
    covariance = J @ torch.linalg.inv(ggn + delta.diag()) @ J.mT
    assert_near(full._glm_predictive_distribution(batch)[1], covariance, 1e-8)
    diagonal = DiagLoraLaplace(model, "classification", uncovered="diag")
    diagonal.fit(loader())
    diagonal.prior_precision = 2.0
    assert_near(diagonal.weight_variance(), 1 / (ggn.diagonal() + delta), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_half_precision(kind, dtype):
    batch = token_batch((4, 2, 5))
    found = []
    for each in (dtype, torch.float32):
        model = adapted(kind, "llama", dtype).float()  # the same rounded weights
        backend = engine_of(model.to(each))
        found.append(backend.jacobians(batch)[0].float())
        assert WholeTensor not in kinds(backend)
    assert_near(found[0], found[1], 0.05)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_gradient_checkpointing_changes_nothing(kind, name):
    model, found = adapted(kind, name), []
    for _ in range(2):
        la = DiagLoraLaplace(model, "classification", uncovered="diag")
        la.fit(loader())
        found.append(la.weight_variance())
        assert WholeTensor not in {type(m) for m in la.engine.maps}
        checkpoint_activations(model.model)
        model.train()
    assert_near(found[1], found[0], EXACT)


@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_the_active_one_of_several_adapters_counts(kind):
    model = adapted(kind, "bert")
    peft = model.model
    peft.add_adapter("second", peft.peft_config["default"])
    peft.set_adapter("second")
    excite(peft).double().eval()
    batch = token_batch((4, 2, 5))
    backend = engine_of(model)
    assert all(".second" in block.name for block in backend.blocks)
    assert_near(backend.jacobians(batch)[0], looped_jacobians(model, batch), EXACT)
    assert WholeTensor not in kinds(backend)
    for layer in peft.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(["default", "second"])
    with pytest.raises(RuntimeError, match="are active together"):
        engine_of(model)


class Difference(nn.Module):
    """What an adapter changes, by a second pass without it."""

    def __init__(self, model, has_gradient):
        super().__init__()
        self.model, self.has_gradient = model, has_gradient

    def forward(self, x):
        y = self.model(x)
        with self.model.disable_adapter(), torch.set_grad_enabled(self.has_gradient):
            without = self.model(x)
        return y - without


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_calls_without_the_adapter_do_not_count(kind, has_gradient):
    torch.manual_seed(0)
    options = {"target_modules": ["0", "2"]}
    config = VeraConfig(r=3, **options)
    if kind == "ia3":
        config = IA3Config(feedforward_modules=["2"], **options)
    base = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    whole = Difference(excite(get_peft_model(base, config)).double(), has_gradient)
    model, x = LogitsModel(whole, output=lambda y: y).eval(), torch.randn(6, 4).double()
    fast, plain = engine_of(model), engine_of(model, whole=True)
    assert_near(fast.jacobians(x)[0], plain.jacobians(x)[0], EXACT)
    assert kinds(plain) == {WholeTensor} and WholeTensor not in kinds(fast)


@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_without_consent_they_are_refused(kind):
    with pytest.raises(ValueError, match=r"no Kronecker factor covers.*uncovered='diag'"):
        LoraGGN(adapted(kind, "bert"), "classification")


def test_the_model_runs_once_for_all_examples():
    model, batch = adapted("ia3", "bert"), token_batch((4, 2, 5))
    backend = engine_of(model)
    backend.jacobians(batch)  # verified
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    backend.jacobians(batch)
    assert len(runs) == 1


def test_convolutions_take_the_slow_way():
    base = resnet().unload()
    config = IA3Config(
        target_modules=["convolution"], feedforward_modules=[], modules_to_save=["classifier.1"]
    )
    model = LogitsModel(excite(get_peft_model(base, config)).double()).eval()
    assert kinds(engine_of(model)) == {WholeTensor}


def test_experts_that_see_routed_tokens_take_the_slow_way():
    """As many tokens as examples, by chance, are not theirs."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.experts[0](x)))

    torch.manual_seed(0)
    config = IA3Config(target_modules=["0"], feedforward_modules=[])
    net = LogitsModel(excite(get_peft_model(Experts(), config)).double(), output=lambda out: out)
    backend = engine_of(net.eval())
    backend.jacobians(torch.randn(3, 4, dtype=torch.float64))
    assert kinds(backend) == {WholeTensor}


def test_dropout_is_refused_as_before():
    model = adapted("vera", "bert")
    backend = LoraGGN(model, "classification", uncovered="diag", verify=False)
    for layer in model.modules():
        layer.training = isinstance(layer, nn.Dropout)
    with pytest.raises(RuntimeError, match="switch dropout off"):
        backend.jacobians(token_batch((4, 2, 5)))
