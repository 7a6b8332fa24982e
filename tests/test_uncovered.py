"""``uncovered="diag"``: exact diagonal blocks where no Kronecker factor fits."""

import pytest
import torch
from laplace import Laplace
from peft import LoraConfig, get_peft_model
from test_checkpoint import forge_tensors
from test_posterior import LOW, loader
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.adapters.diagonal_maps import ElementwiseMap, WholeTensor
from laplace_lora.likelihoods.roots import hessian_root
from laplace_lora.linalg.factors import DiagonalFactor
from tiny import (
    SHARING,
    TARGETS,
    assert_near,
    base_model,
    excite,
    explicit_jacobians,
    peft_model,
    token_batch,
)

BATCH = token_batch((4, 2, 5))


def norms(name, **kwargs):
    """A model whose norms and position embeddings are trained whole, beside adapters."""
    model = peft_model(name, **kwargs)
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("norm", "Norm", "ln_", "position_emb", "relative_att")):
            parameter.requires_grad_(True)
    return excite(model)


def dora(name):
    model = peft_model(name, use_dora=True)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.abs_().add_(0.5)
    return model


def deberta():
    _, _, modules, heads = SHARING["deberta"]
    config = LoraConfig(r=2, target_modules=modules, modules_to_save=heads)
    return excite(get_peft_model(base_model("deberta"), config)).double()


MODELS = {
    "norms of bert": lambda: norms("bert"),
    "norms of llama": lambda: norms("llama"),
    "norms of gpt2": lambda: norms("gpt2"),
    "norms and relative biases of t5": lambda: norms("t5-lm"),
    "dora": lambda: dora("bert"),
    "dora on embeddings": lambda: peft_model(
        "bert", target_modules=["word_embeddings", "query"], use_dora=True
    ),
    "deberta": deberta,
}


def wrapped(key):
    return LogitsModel(MODELS[key](), target_ids=TARGETS if key.endswith("t5") else None).eval()


@pytest.mark.parametrize("key", MODELS)
def test_jacobians_and_blocks_are_exact(key):
    model = wrapped(key)
    backend = LoraGGN(model, "classification", factor_rank=8, uncovered="diag")
    f, blocks = backend.jacobian_blocks(BATCH)
    expected = explicit_jacobians(model, BATCH)
    assert_near(list(blocks), expected)
    _, kron = backend.kron(BATCH, BATCH["labels"], N=3)
    roots = hessian_root(f, "classification")
    diagonal = 0
    for block, factors, J in zip(backend.blocks, kron.kfacs, expected, strict=True):
        if isinstance(factors[0], DiagonalFactor):
            diagonal += 1
            rows = torch.einsum("knc,ncp->knp", roots, J.flatten(2))
            assert_near(factors[0].sums, rows.square().sum((0, 1)))
        else:
            assert "lora" in block.name or "modules_to_save" in block.name
    assert diagonal > 3


def test_norms_and_magnitudes_take_the_fast_way():
    kinds = {}
    for key in ("norms of bert", "norms of gpt2", "dora", "norms and relative biases of t5"):
        backend = LoraGGN(wrapped(key), "classification", uncovered="diag")
        backend.jacobians(BATCH)
        for block in backend.blocks:
            kinds.setdefault(type(backend.maps[block.map]), []).append(block.name)
    fast, slow = kinds[ElementwiseMap], kinds[WholeTensor]
    assert all("norm" in n.lower() or "ln_" in n or "magnitude" in n for n in fast)
    assert slow and all("position_emb" in n or "relative_attention_bias" in n for n in slow)


class Norms(nn.Module):
    """Norms of several kinds, one of which normalises another dimension than it seems to."""

    class ChannelsRMSNorm(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(d))

        def forward(self, x):
            return x * self.weight.unsqueeze(-1)  # of the tokens, which are as many

    class SquaredRMSNorm(ChannelsRMSNorm):
        def forward(self, x):
            return x * self.weight.square()

    def __init__(self):
        super().__init__()
        self.gemma, self.torch = GemmaRMSNorm(4), nn.RMSNorm(4)
        self.channels, self.squared = self.ChannelsRMSNorm(4), self.SquaredRMSNorm(4)
        self.layer = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.gemma(torch.tanh(self.torch(x)))
        x = torch.tanh(self.squared(self.channels(x)))
        x = self.layer(torch.tanh(x)) + self.layer(x).square()  # one norm, called twice
        return self.scale * self.head(x).mean(1)


def test_what_only_looks_like_a_norm_takes_the_slow_way():
    torch.manual_seed(0)
    net = excite(Norms()).double().eval()
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    backend = LoraGGN(net, "classification", uncovered="diag")
    jacobians, _ = backend.jacobians(x)
    expected = explicit_jacobians(net, x)
    assert_near(jacobians, torch.cat([j.reshape(5, 3, -1) for j in expected], -1))
    slow = {b.name for b in backend.blocks if isinstance(backend.maps[b.map], WholeTensor)}
    assert slow == {"scale", "channels.weight", "squared.weight"}


@pytest.mark.parametrize("cls,kwargs", [(KronLoraLaplace, LOW), (DiagLoraLaplace, {})])
@pytest.mark.parametrize("key", ["norms of bert", "deberta"])
def test_posteriors_fit_predict_merge_and_come_back(key, cls, kwargs, tmp_path):
    model = wrapped(key)
    la = cls(model, "classification", uncovered="diag", **kwargs)
    assert la.estimate_memory(BATCH).curvature > 0
    la.fit(loader(2))
    la.optimize_prior_precision()
    jacobians = torch.cat([j.flatten(2) for j in explicit_jacobians(model, BATCH)], -1)
    mean, covariance = la._glm_predictive_distribution(BATCH)
    assert_near(covariance, la.functional_variance(jacobians))
    assert_near(mean, model(BATCH).detach())
    la.save_pretrained(tmp_path)
    again = cls.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert la(BATCH, pred_type="nn", link_approx="mc", n_samples=2).isfinite().all()
    reference = la.log_marginal_likelihood()
    la.fit(loader(7, pad_to=9))
    assert_near(la.log_marginal_likelihood(), reference)
    again.fit(loader(7), override=False)
    once = cls(model, "classification", uncovered="diag", **kwargs)
    once.fit(loader(7))
    twice = cls(model, "classification", uncovered="diag", **kwargs)
    twice.fit(loader(3))
    twice.merge([once])
    again.prior_precision = twice.prior_precision
    assert again.n_data == twice.n_data == 14
    assert_near(again(BATCH), twice(BATCH))


def test_the_posterior_is_a_gaussian_with_that_precision():
    la = KronLoraLaplace(wrapped("norms of bert"), "classification", uncovered="diag", **LOW)
    la.fit(loader())
    P = la.posterior_precision
    assert_near(P.diag(-1), P.to_matrix(-1).diagonal())
    assert_near(P.logdet(), torch.logdet(P.to_matrix()))
    assert_near(P.to_matrix() @ P.to_matrix(-1), torch.eye(la.n_params).double())
    assert la.sample(2).shape == (2, la.n_params)


def test_all_answers_of_the_backend_agree():
    model = wrapped("deberta")
    backend = LoraGGN(model, "classification", uncovered="diag")
    J = torch.cat([j.flatten(2) for j in explicit_jacobians(model, BATCH)], -1)
    y = BATCH["labels"]
    f = model(BATCH).detach()
    rows = torch.einsum("knc,ncp->nkp", hessian_root(f, "classification"), J).flatten(0, 1)
    assert_near(backend.full(BATCH, y)[1], rows.T @ rows)
    assert_near(backend.diag(BATCH, y)[1], rows.square().sum(0))
    assert_near(backend.jacobians(BATCH)[0], J)
    residual = f.softmax(-1) - torch.nn.functional.one_hot(y, 3)
    assert_near(backend.gradients(BATCH, y)[0], torch.einsum("nc,ncp->np", residual, J))


def test_plain_laplace_torch_holds_vectors_and_refuses_matrices():
    model = wrapped("dora")
    la = Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=LoraGGN,
        backend_kwargs={"uncovered": "diag"},
    )
    ours = KronLoraLaplace(model, "classification", uncovered="diag", factor_rank=None)
    for posterior in (la, ours):
        posterior.fit(loader())
    assert_near(la.log_marginal_likelihood(), ours.log_marginal_likelihood())
    backend = LoraGGN(wrapped("norms of bert"), "classification", uncovered="diag")
    with pytest.raises(ValueError, match=r"plain Kron cannot hold .*position_embeddings"):
        backend.kron(BATCH, BATCH["labels"], N=3)


def test_tied_and_grouped_weights_have_a_diagonal():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.conv = nn.Conv1d(4, 4, 3, groups=2)
            self.grouped = nn.Conv2d(1, 3, 2)

        def forward(self, x):
            x = torch.tanh(self.conv(torch.tanh(self.second(torch.tanh(self.first(x))))))
            return self.grouped(x.unsqueeze(1)).mean((2, 3))

    torch.manual_seed(0)
    net = Tied().double().eval()
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    jacobians, _ = LoraGGN(net, "classification", uncovered="diag").jacobians(x)
    expected = explicit_jacobians(net, x)
    assert_near(jacobians, torch.cat([j.flatten(2) for j in expected], -1))


def test_models_that_mix_examples_are_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.scale * (x - x.mean(0))

    backend = LoraGGN(Mixing(), "classification", uncovered="diag")
    with pytest.raises(RuntimeError, match="output for example 0 alone differs"):
        backend.jacobians(torch.randn(4, 3))


class Sometimes(nn.Module):
    """Runs its layer on inputs of different shapes when an example starts with a 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        out = self.layer(x).mean(1)
        if x[0, 0, 0] == 1:
            out = out + self.layer(x[:, 0])
        return self.head(torch.tanh(out))


def test_layers_that_change_in_mid_fit_end_it_and_are_diagonal_the_next_time():
    data = [(torch.full((2, 3), float(i)), i % 2) for i in range(2)]
    data = torch.utils.data.DataLoader(data, batch_size=1)
    la = KronLoraLaplace(LogitsModel(Sometimes()), "classification", uncovered="diag")
    with pytest.raises(RuntimeError, match="fit again"):
        la.fit(data)
    la.fit(data)
    assert isinstance(la.H_facs.kfacs[0][0], DiagonalFactor)
    strict = KronLoraLaplace(LogitsModel(Sometimes()), "classification")
    with pytest.raises(RuntimeError, match=r"layer' ran 2 times.*uncovered='diag'"):
        strict.fit(data)


def test_nothing_is_left_in_training_mode():
    """Jacobians asked for late are those of evaluation mode, as the outputs are."""
    model = wrapped("norms of bert")
    la = KronLoraLaplace(model, "classification", uncovered="diag", **LOW)
    la.fit(loader())
    model.train()
    la.optimize_prior_precision(method="gridsearch", val_loader=loader())
    assert model.training
    reference = la.prior_precision
    model.eval()
    la.optimize_prior_precision(method="gridsearch", val_loader=loader())
    assert torch.equal(la.prior_precision, reference)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="uncovered must be one of"):
        KronLoraLaplace(wrapped("dora"), "classification", uncovered="diagonal")


def test_diagonals_add_up_and_refuse_what_is_not_finite():
    rows = torch.randn(6, 5)
    factor = DiagonalFactor.zeros(5, torch.float64, "cpu")
    factor.update(rows[:2])
    factor.update(rows[2:], weight=2.0)
    assert_near(factor.sums, (rows[:2].square().sum(0) + 2 * rows[2:].square().sum(0)).double())
    assert_near((factor * 3).add(factor).sums, 4 * factor.sums)
    assert_near(factor.add(torch.ones(5, 5)).sums, factor.sums + 1)
    factor.update(torch.full((1, 5), torch.inf))
    with pytest.raises(FloatingPointError, match="not finite"):
        factor.decompose()


@pytest.mark.parametrize("kind", ["negative", "square", "missing", "nan", "factors"])
def test_forged_diagonals_are_refused(kind, tmp_path):
    la = KronLoraLaplace(wrapped("dora"), "classification", uncovered="diag", **LOW)
    la.fit(loader())
    la.save_pretrained(tmp_path)

    def change(tensors):
        name = next(n for n in tensors if n.endswith(".diagonal"))
        if kind == "negative":
            tensors[name].neg_()
        elif kind == "square":
            tensors[name] = tensors[name].diag()
        elif kind == "nan":
            tensors[name][0] = torch.nan
        else:
            matrix = tensors.pop(name).diag()
            if kind == "factors":  # a dense block where a diagonal belongs
                stem = name.removesuffix("diagonal")
                eigen = {"matrix": matrix, "vectors": matrix.clone(), "values": matrix.diag()}
                tensors |= {stem + part: tensor for part, tensor in eigen.items()}
                tensors[stem + "residual"] = torch.zeros(()).double()

    forge_tensors(tmp_path, change)
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
