"""Last-layer posteriors, and posteriors over some of the adapters."""

import copy

import pytest
import torch
from laplace import (
    DiagLLLaplace,
    FullLLLaplace,
    FunctionalLLLaplace,
    KronLLLaplace,
    Laplace,
    LLLaplace,
)
from laplace.curvature import CurvlinopsGGN
from test_posterior import loader
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import (
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraGGN,
)
from tiny import TARGETS, assert_near, peft_model, token_batch

BATCH = token_batch((4, 2, 6), seed=9)
PARAMETRIC = [KronLoraLLLaplace, DiagLoraLLLaplace, FullLoraLLLaplace]
PLAIN = {
    "kron": (KronLoraLLLaplace, KronLLLaplace),
    "diag": (DiagLoraLLLaplace, DiagLLLaplace),
    "full": (FullLoraLLLaplace, FullLLLaplace),
    "gp": (FunctionalLoraLLLaplace, FunctionalLLLaplace),
}
MODELS = ["llama", "llama-frozen", "bert", "bert-frozen", "roberta", "llama-lm"]


def logits_model(name, **kwargs):
    base, _, frozen = name.partition("-frozen")
    if name.endswith("-frozen"):
        kwargs["modules_to_save"] = None
    del frozen
    targets = TARGETS if base.endswith("-lm") else None
    return LogitsModel(peft_model(base, **kwargs), target_ids=targets)


def padded(side):
    return loader(pad_to=9, side=side)


def by_name(model, structure, route):
    options = {"n_subset": 6} if structure == "gp" else {}
    if route == "last_layer":
        options["backend"] = LoraGGN
    return Laplace(
        model, "classification", subset_of_weights=route, hessian_structure=structure, **options
    )


def explicit_head_ggn(model, data):
    """GGN of the head's weight and bias by a loop over examples and outputs."""
    features, weight, bias = [], *model.head_tensors()
    model.eval()
    total = 0
    for batch in data:
        phi, logits = model.features(batch)
        features.append(phi)
        for a, f in zip(phi.detach(), logits.detach(), strict=True):
            p = f.softmax(-1)
            columns = [torch.kron(torch.eye(len(f)).double()[c], a) for c in range(len(f))]
            J = torch.stack(columns)
            if bias is not None:
                J = torch.cat([J, torch.eye(len(f)).double()], dim=1)
            total = total + J.T @ (p.diag() - torch.outer(p, p)) @ J
    assert weight.shape == (len(f), len(a))
    return total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("route", ["lora_last_layer", "last_layer"])
def test_full_structure_is_the_exact_ggn_of_the_head(name, side, route):
    model = logits_model(name)
    la = by_name(model, "full", route)
    la.fit(padded(side))
    assert_near(la.H, explicit_head_ggn(model, padded(side)))


@pytest.mark.parametrize(
    "name,side",
    # Encoders number their positions from the left: padding there would be another input.
    [
        *((name, "right") for name in MODELS),
        *((name, "left") for name in MODELS if "llama" in name),
    ],
)
@pytest.mark.parametrize("structure", PLAIN)
def test_every_way_keeps_the_models_own_logits(name, structure, side):
    model = logits_model(name)
    own = model.eval()(token_batch((4, 2, 6), seed=9, side=side)).detach()
    for route in ("lora_last_layer", "last_layer") if structure != "gp" else ("lora_last_layer",):
        la = by_name(model, structure, route)
        assert isinstance(la, PLAIN[structure][1])
        assert type(la) is PLAIN[structure][route == "last_layer"]
        la.fit(padded(side))
        mean, covariance = la._glm_predictive_distribution(
            token_batch((4, 2, 6), seed=9, pad_to=8, side=side)
        )
        assert_near(mean, own)
        assert_near(covariance, covariance.mT)
        assert la(BATCH).isfinite().all()


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["llama", "bert-frozen", "llama-lm"])
def test_both_routes_agree(structure, name):
    model = logits_model(name)
    ours, theirs = (by_name(model, structure, r) for r in ("lora_last_layer", "last_layer"))
    for la in (ours, theirs):
        la.fit(loader())
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for link in ("probit", "bridge"):
        assert_near(ours(BATCH, link_approx=link), theirs(BATCH, link_approx=link))


def test_the_transformer_exists_once():
    model = logits_model("llama-lm")
    frozen = {p.data_ptr() for p in model.parameters()}
    head = model.head_tensors()[0].numel()
    for structure in PLAIN:
        for route in ("lora_last_layer", "last_layer"):
            if (structure, route) == ("gp", "last_layer"):
                continue
            la = by_name(model, structure, route)
            la.fit(loader())
            own = [p for p in la.model.parameters() if p.data_ptr() not in frozen]
            assert sum(p.numel() for p in own) == head
            assert sum(p.numel() for p in la.model.parameters()) == head


def test_a_copy_has_a_head_of_its_own_and_nothing_else():
    model = logits_model("bert").eval()
    duplicate = copy.deepcopy(model)
    assert_near(duplicate(BATCH), model(BATCH))
    with torch.no_grad():
        duplicate.head.weight.zero_()
    assert model.head_tensors()[0].any()
    again = copy.deepcopy(duplicate)
    assert_near(again(BATCH), model(BATCH))


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_posterior_protocol(cls):
    la = cls(logits_model("llama"), "classification")
    assert isinstance(la, LLLaplace)
    with pytest.raises(AttributeError, match="not fitted"):
        la(BATCH)
    la.fit(loader(), progress_bar=True)
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision()
    assert la.log_marginal_likelihood() > before
    validation = loader(lengths=(4, 6, 2, 5), seed=7)
    la.optimize_prior_precision(method="gridsearch", val_loader=validation, grid_size=5)
    la.optimize_prior_precision(method="val_gd", val_loader=validation, n_steps=5)
    result = la.calibrate(validation)
    assert result.nll_after <= result.nll_before
    assert_near(la(BATCH).sum(-1), torch.ones(3).double())
    other = cls(logits_model("llama"), "classification")
    other.load_state_dict(la.state_dict())
    assert_near(other(BATCH), la(BATCH))


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_one_pass_grid_of_the_head(cls):
    la = cls(logits_model("bert"), "classification")
    la.fit(loader())
    (batch,) = loader(7)
    mean, blocks = la.gram_blocks(batch)
    grams = [gram for _, pairs in blocks for gram in pairs]
    for delta in (0.01, 1.0, 30.0):
        la.prior_precision = delta
        expected_mean, expected = la._glm_predictive_distribution(batch)
        assert_near(sum((M / (e + delta)).sum(-1) for e, M in grams), expected)
        assert_near(mean, expected_mean)


def test_layerwise_priors_where_the_structure_allows():
    for cls in (KronLoraLLLaplace, DiagLoraLLLaplace):
        la = cls(logits_model("bert"), "classification")
        la.fit(loader())
        la.optimize_prior_precision()
        scalar = la.log_marginal_likelihood()
        la.optimize_prior_precision(prior_structure="layerwise")
        assert len(la.prior_precision) == 2
        assert la.log_marginal_likelihood() >= scalar
        assert la(BATCH).isfinite().all()
    la = FullLoraLLLaplace(logits_model("bert"), "classification")
    la.fit(loader())
    with pytest.raises(ValueError, match="a full matrix cannot have"):
        la.optimize_prior_precision(prior_structure="layerwise")


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_sampled_heads_compute_the_features_once_and_touch_nothing(cls):
    model = logits_model("llama-lm")
    la = cls(model, "classification", prior_precision=100.0)
    la.fit(loader())
    weights = parameters_to_vector(model.parameters()).clone()
    head = la.model.last_layer.weight.clone()
    passes = []
    handle = model.register_forward_hook(lambda *args: passes.append(1))
    samples = la.predictive_samples(BATCH, pred_type="nn", n_samples=2000)
    handle.remove()
    assert len(passes) == 1
    glm = la(BATCH, link_approx="mc", n_samples=4000)
    torch.testing.assert_close(samples.mean(0), glm, atol=0.03, rtol=0)
    assert torch.equal(parameters_to_vector(model.parameters()), weights)
    assert torch.equal(la.model.last_layer.weight, head)


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_last_layer_regression(cls):
    la = cls(LogitsModel(peft_model("bert")), "regression", sigma_noise=0.7)
    la.fit(loader(likelihood="regression"))
    la.optimize_prior_precision(tune_sigma_noise=True)
    mean, covariance = la(BATCH)
    assert mean.shape == (3, 3) and covariance.shape == (3, 3, 3)
    assert la.sigma_noise != 0.7


def test_gaussian_process_on_all_data_is_the_exact_posterior_of_regression():
    model = LogitsModel(peft_model("bert", num_labels=1))
    batch = token_batch((5,) * 6)
    batch["labels"] = torch.randn(6, 1).double()
    examples = [{k: v[n] for k, v in batch.items()} for n in range(6)]
    data = DataLoader(examples, batch_size=4)
    gp = FunctionalLoraLLLaplace(model, "regression", n_subset=6, prior_precision=2.0)
    full = FullLoraLLLaplace(model, "regression", prior_precision=2.0)
    for la in (gp, full):
        la.fit(data)
    assert_near(list(gp(BATCH)), list(full(BATCH)))


def test_gaussian_process_options():
    gp = FunctionalLoraLLLaplace(
        peft_model("llama-lm"), "classification", n_subset=50, target_ids=TARGETS
    )
    with pytest.raises(ValueError, match="n_subset is 50, but there are 7"):
        gp.fit(loader())


def test_plain_gaussian_process_takes_pairs_of_tensors():
    """laplace-torch's own takes neither mappings nor other backends than three it names."""
    model = logits_model("bert")
    batch = token_batch((5,) * 6)
    data = DataLoader(TensorDataset(batch["input_ids"], batch["labels"]), batch_size=3)
    options = {"subset_of_weights": "last_layer", "hessian_structure": "gp", "n_subset": 4}
    la = Laplace(model, "classification", backend=CurvlinopsGGN, **options)
    la.fit(data)
    ours = FunctionalLoraLLLaplace(model, "classification", n_subset=4)
    ours.fit(data)
    assert_near(ours(batch["input_ids"]), la(batch["input_ids"]))
    with pytest.raises(AssertionError):
        Laplace(model, "classification", backend=LoraGGN, **options)


def test_heads_that_are_not_linear_are_refused():
    adapted = peft_model("llama-lm", target_modules=["q_proj", "lm_head"])
    with pytest.raises(RuntimeError, match="not a linear map"):
        KronLoraLLLaplace(adapted, "classification", target_ids=TARGETS).fit(loader())
    transformed = LogitsModel(peft_model("bert"), output=lambda out: out.logits.tanh())
    with pytest.raises(RuntimeError, match="not a linear map"):
        KronLoraLLLaplace(transformed, "classification").fit(loader())
    with pytest.raises(ValueError, match="no linear last layer"):
        KronLoraLLLaplace(LogitsModel(nn.Conv1d(2, 2, 1)), "classification")
    with pytest.raises(ValueError, match="cannot be differentiated"):
        KronLoraLLLaplace(peft_model("bert"), "classification", enable_backprop=True)


def test_half_precision_models_have_single_precision_heads():
    la = KronLoraLLLaplace(peft_model("bert", dtype=torch.bfloat16), "classification")
    la.fit(loader())
    assert la.model.last_layer.weight.dtype == torch.float32
    assert la(BATCH).dtype == torch.float32


def test_low_rank_sides_on_request():
    dense = KronLoraLLLaplace(logits_model("bert"), "classification")
    low = KronLoraLLLaplace(
        logits_model("bert"), "classification", factor_rank=2, low_rank_threshold=4
    )
    for la in (dense, low):
        la.fit(loader())
    assert low.H.blocks[0][1].multiplicity == 14
    assert dense.H.blocks[0][1].multiplicity == 0
    assert not torch.allclose(low(BATCH), dense(BATCH), rtol=1e-9)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("lora_B", 4),
        (r"layers\.1.*q_proj", 2),
        (["score"], 1),
        (["q_proj", "score"], 5),
        (["layers.1"], 4),
        (None, 9),
    ],
)
def test_a_posterior_may_cover_some_modules(modules, expected):
    model = peft_model("llama")
    flags = [p.requires_grad for p in model.parameters()]
    la = KronLoraLaplace(model, "classification", modules=modules, factor_rank=None)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert la.n_layers == len(la.params) == len(la.block_names) == expected
    everything = KronLoraLaplace(model, "classification", factor_rank=None)
    for posterior in (la, everything):
        posterior.fit(loader())
    whole = dict(zip(everything.block_names, everything.H_facs.kfacs, strict=True))
    for name, factors in zip(la.block_names, la.H_facs.kfacs, strict=True):
        for x, y in zip(factors, whole[name], strict=True):
            assert_near(x.matrix, y.matrix)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_what_is_not_covered_stays_at_its_map_value():
    model = peft_model("llama")
    la = KronLoraLaplace(model, "classification", modules=["score"])
    la.fit(loader())
    covered = {id(p) for p in la.params}
    others = {n: p.clone() for n, p in model.named_parameters() if id(p) not in covered}
    seen = []
    handle = la.model.register_forward_hook(
        lambda *args: seen.append(
            all(torch.equal(dict(model.named_parameters())[n], p) for n, p in others.items())
        )
    )
    la(BATCH, pred_type="nn", link_approx="mc", n_samples=3)
    handle.remove()
    assert seen == [True] * 3
    last = FullLoraLLLaplace(model, "classification")
    last.fit(loader())
    assert la.n_params == last.n_params


def test_modules_that_match_nothing_list_what_there_is():
    model = peft_model("llama")
    for modules in ("k_proj", ["q_pro"]):
        with pytest.raises(ValueError, match=r"matches no trainable module.*q_proj\.lora_A"):
            KronLoraLaplace(model, "classification", modules=modules)
    assert any(p.requires_grad for p in model.parameters())
