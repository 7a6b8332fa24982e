"""Base models in 8 and 4 bits: adapters in single precision over packed weights."""

import importlib.util

import pytest
import torch
from peft import IA3Config, VeraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    LogitsModel,
    LoraGGN,
)
from laplace_lora.adapters.diagonal_maps import WholeTensor
from laplace_lora.adapters.discovery import linear_maps
from laplace_lora.adapters.packed_weights import bits_of
from laplace_lora.generation import generate, score
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.storage.archive import load_state
from laplace_lora.storage.files import read_files
from laplace_lora.storage.identity import BASE_BITS
from support.batches import loader, token_batch
from support.language import text_batch, text_loader
from support.models import ARCHITECTURES, TARGETS, adapter_config, base_model, excite
from support.posteriors import LOW
from support.references import assert_near

BATCH = token_batch((4, 2), seed=3)
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


class PackedLinear(nn.Linear):
    """A linear layer whose frozen weight is stored as bytes, two to a column, as in 4 bits."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        weight = linear.weight.detach()
        self.scale = weight.abs().max() / 7
        codes = (weight / self.scale).round().add(8).to(torch.uint8).reshape(-1, 2)
        self.weight = nn.Parameter(codes[:, :1] * 16 + codes[:, 1:], requires_grad=False)
        self.bias = linear.bias

    def dense(self):
        codes = torch.cat([self.weight // 16, self.weight % 16], dim=1)
        return (codes.float() - 8).reshape(self.out_features, self.in_features) * self.scale

    def forward(self, x):
        return F.linear(x, self.dense().to(x.dtype), self.bias)


def replace_linears(model, make):
    """Put another layer in place of every linear one of the transformer's body."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name not in ("score", "classifier", "lm_head"):
                setattr(module, name, make(child))
    return model


def unpacked(packed):
    linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
    linear.weight = nn.Parameter(packed.dense(), requires_grad=False)
    linear.bias = packed.bias
    return linear


def adapted(name, base):
    for p in base.parameters():
        p.requires_grad_(False)
    return excite(get_peft_model(base, adapter_config(name)))


@pytest.mark.parametrize("name", ["bert", "llama-lm"])
def test_packed_weights_change_nothing(name, tmp_path):
    """The stand-in's posterior is that of the same weights in single precision."""
    packed = replace_linears(base_model(name), PackedLinear)
    targets = TARGETS if name.endswith("-lm") else None
    model = adapted(name, packed)
    assert any(p.dtype == torch.uint8 for p in model.parameters())
    la = KronLoraLaplace(model, "classification", target_ids=targets, **LOW)
    la.fit(loader())
    la.optimize_prior_precision(n_steps=5)
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    sizes = {m.name: (m.in_features, m.out_features) for m in linear_maps(model)}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            assert (module.in_features, module.out_features) in sizes.values()
            module.forward = unpacked(module).forward
    reference = KronLoraLaplace(model, "classification", target_ids=targets, **LOW)
    reference.fit(loader())
    reference.prior_precision = la.prior_precision
    assert_near(la(BATCH), reference(BATCH))
    with torch.no_grad():
        next(p for p in model.parameters() if p.dtype == torch.uint8).add_(1)
    with pytest.raises(ValueError, match="base model differs"):
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_packed_weights_that_changed_are_noticed_and_another_layout_is_none(tmp_path):
    model = adapted("bert", replace_linears(base_model("bert"), PackedLinear))
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    state = la.state_dict()
    weight = next(p for p in model.parameters() if p.dtype == torch.uint8)
    before = weight.data
    weight.data = (before % 16 * 16 + before // 16).flip(0)
    la.optimize_prior_precision(n_steps=2)
    weight.data = before.clone()
    weight.data[0, 0] ^= 1
    other = KronLoraLaplace(model, "classification")
    other.load_state_dict(state)
    for call in (
        lambda: la(BATCH),
        lambda: la.optimize_prior_precision(n_steps=2),
        lambda: la.save_pretrained(tmp_path),
        lambda: la.fit(loader(), override=False),
        lambda: other(BATCH),
    ):
        with pytest.raises(RuntimeError, match=r"quantised weights '.*' have changed since"):
            call()
    weight.data = before
    assert la(BATCH).isfinite().all()


def test_an_adapter_loaded_for_inference_is_made_trainable_over_packed_weights(tmp_path):
    from peft import PeftModel

    adapted("bert", replace_linears(base_model("bert"), PackedLinear)).save_pretrained(tmp_path)
    base = replace_linears(base_model("bert"), PackedLinear)
    for p in base.parameters():
        p.requires_grad_(False)
    la = DiagLoraLaplace(PeftModel.from_pretrained(base, tmp_path), "classification")
    la.fit(loader())
    assert la(BATCH).isfinite().all()


def test_a_packed_head_is_refused_by_last_layer_posteriors():
    model = base_model("llama-lm")
    model.lm_head = PackedLinear(model.lm_head)
    model.config.tie_word_embeddings = False
    wrapped = LogitsModel(adapted("llama-lm", model), target_ids=TARGETS)
    assert wrapped.vocabulary_size == 50
    KronLoraLaplace(wrapped, "classification").fit(loader())
    with pytest.raises(ValueError, match="quantised"):
        FullLoraLLLaplace(wrapped, "classification")


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}


def quantised(name, bits, folder, storage="uint8", adapter=None):
    kind, make_config, _, _ = ARCHITECTURES[name]
    config = make_config(num_labels=3)
    for key, value in {**SIZES, "head_dim": 32}.items():
        setattr(config, key, value)
    if not folder.exists():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=["score", "classifier", "lm_head"],
    )
    base = kind.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, adapter_config(name) if adapter is None else adapter)
    next(p for n, p in model.named_parameters() if "norm" in n.lower()).requires_grad_(True)
    return excite(model)


def jacobian(la):
    return torch.cat([j.flatten(2) for j in la.engine.jacobian_blocks(BATCH)[1]], -1)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_texts_over_four_bits_are_sampled_and_those_over_eight_refused(tmp_path):
    model = quantised("llama-lm", 4, tmp_path / "base").eval()
    la = KronLoraLaplace(model, "language_modeling", uncovered="diag", prior_precision=20.0, **LOW)
    la.fit(text_loader())
    exact = score(la, text_batch(), 4, method="exact")
    ours = score(la, text_batch(), 4, n_samples=2048, generator=torch.Generator().manual_seed(0))
    assert_near(ours.mean, exact.mean, 1e-4)
    S = exact.covariance
    variance = S.diagonal(dim1=-2, dim2=-1)
    error = (variance[..., None] * variance[..., None, :] + S.square()) / 1024
    assert ((ours.covariance - S).abs() <= 4 * error.sqrt() + 1e-4 * S.abs().max()).all()
    written = generate(la, text_batch()["input_ids"][:, :3], 3, 4)
    assert written.mutual_information[written.mask].gt(0).all()
    answers = KronLoraLaplace(model, "classification", target_ids=TARGETS, uncovered="diag", **LOW)
    answers.fit(loader())
    sampled = answers(BATCH, method="sampled", n_samples=2048)
    assert_near(sampled, answers(BATCH, method="exact"), 0.02)
    eight = quantised("llama-lm", 8, tmp_path / "base").eval()
    la = DiagLoraLaplace(eight, "language_modeling", uncovered="diag")
    la.fit(text_loader())
    with pytest.raises(ValueError, match=r"is quantised \(Linear8bitLt\).* or 4 bits"):
        score(la, text_batch(), 4)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["bert", "llama-lm"])
def test_bitsandbytes_models_fit_predict_and_come_back(name, bits, tmp_path):
    model = quantised(name, bits, tmp_path / "base").eval()
    assert any(not p.is_floating_point() for p in model.parameters())
    targets = TARGETS if name.endswith("-lm") else None
    la = KronLoraLaplace(model, "classification", target_ids=targets, uncovered="diag", **LOW)
    la.fit(loader())
    la.optimize_prior_precision(n_steps=5)
    probs, J = la(BATCH), jacobian(la)
    la.save_pretrained(tmp_path / "posterior")
    with torch.no_grad():
        f = la.model(BATCH)  # lays the 4-bit weights out anew, with coarser scales
    assert not model.training
    with evaluation_mode(model):
        f = la.model(BATCH)
        for n in range(len(f)):
            for c in range(f.shape[1]):
                grads = torch.autograd.grad(f[n, c], la.params, retain_graph=True)
                assert_near(torch.cat([g.flatten() for g in grads]), J[n, c], 0.05)
    assert_near(jacobian(la), J, 0.05)
    assert_near(la(BATCH), probs, 0.01)
    fresh = quantised(name, bits, tmp_path / "base")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for n, p in fresh.named_parameters():
        if n in trained:
            p.requires_grad_(True).data.copy_(model.get_parameter(n))
    again = KronLoraLaplace.from_pretrained(fresh, tmp_path / "posterior")
    assert_near(again(BATCH), probs, 0.01)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_vectors_over_packed_weights_need_no_pass_for_each_example(kind, bits, tmp_path):
    layers = ["query", "attention.output.dense"]
    config = {
        "ia3": IA3Config(target_modules=layers, feedforward_modules=layers[1:]),
        "vera": VeraConfig(r=5, target_modules=layers),
    }[kind]
    model = LogitsModel(quantised("bert", bits, tmp_path / "base", adapter=config)).eval()
    backend = LoraGGN(model, "classification", uncovered="diag")
    J, _ = backend.jacobians(BATCH)
    assert not any(isinstance(m, WholeTensor) for m in backend.maps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with evaluation_mode(model):
        f = model(BATCH)
    for n in range(len(f)):
        for c in range(f.shape[1]):
            grads = torch.autograd.grad(f[n, c], parameters, retain_graph=True)
            assert_near(J[n, c], torch.cat([g.flatten() for g in grads]), 1e-4)


def test_the_bits_of_the_stand_in_are_four():
    packed = replace_linears(base_model("bert"), PackedLinear)
    assert bits_of(packed) == 4 and bits_of(base_model("bert")) is None


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
def test_a_base_in_other_bits_is_refused_by_that_name(tmp_path):
    def like(model, other):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(other.get_parameter(name))
        return model

    four, eight = (quantised("llama", bits, tmp_path / "base") for bits in (4, 8))
    la = KronLoraLaplace(four, "classification", uncovered="diag", **LOW)
    la.fit(loader())
    la.save_pretrained(tmp_path)
    words = "differs .* that was in 4 bits, and this one is {}; load it in the same way"
    with pytest.raises(ValueError, match=words.format("in 8 bits")):
        KronLoraLaplace.from_pretrained(like(eight, four), tmp_path)
    plain = excite(
        get_peft_model(
            type(four.get_base_model()).from_pretrained(tmp_path / "base", dtype=torch.float32),
            adapter_config("llama"),
        )
    )
    next(p for n, p in plain.named_parameters() if "norm" in n.lower()).requires_grad_(True)
    with pytest.raises(ValueError, match=words.format("not quantised")):
        KronLoraLaplace.from_pretrained(like(plain, four), tmp_path)
    payload, config = read_files(tmp_path)
    del config[BASE_BITS]  # as earlier versions wrote it
    with pytest.raises(ValueError, match=r"posterior was fitted on$"):
        load_state(
            KronLoraLaplace(eight, "classification", uncovered="diag", **LOW).parts, payload, config
        )


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits,storage", [(8, "uint8"), (4, "uint8"), (4, "bfloat16")])
def test_a_base_that_merging_has_rounded_anew_is_refused(bits, storage, tmp_path):
    """Also where 4-bit weights lie in memory as if they were floating-point numbers."""
    model = quantised("llama", bits, tmp_path / "base", storage).eval()
    assert bits_of(model) == bits
    la = KronLoraLaplace(model, "classification", uncovered="diag", **LOW)
    la.fit(loader())
    probs = la(BATCH)
    with torch.no_grad():
        la.model(BATCH)  # lays the 4-bit weights out anew
    la.optimize_prior_precision(n_steps=2)
    model.state_dict()  # lays them out as they were
    assert_near(la(BATCH), probs, 0.05)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"quantised weights .* load the base model and the"):
        la(BATCH)
    model.unmerge_adapter()
    for call in (
        lambda: la(BATCH),
        lambda: la.optimize_prior_precision(n_steps=2),
        lambda: la.save_pretrained(tmp_path),
        lambda: la.fit(loader(), override=False),
    ):
        with pytest.raises(RuntimeError, match=r"quantised weights .*rounds them anew"):
            call()
    la.fit(loader())
    assert la(BATCH).isfinite().all()
