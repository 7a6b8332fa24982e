"""Other libraries as oracles: on unpadded batches dense factors equal theirs."""

import pytest
import torch
from laplace import DiagLaplace, FullLaplace, KronLaplace, Laplace
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsEF, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import LogitsModel, LoraEF, LoraGGN
from support.batches import token_batch
from support.models import ARCHITECTURES, TARGETS, peft_model
from support.references import assert_near

pytestmark = [
    # BackPACK and ASDL hook into modules whose inputs need no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
]
LENGTHS = (6,) * 7


def logits_model(name, **kwargs):
    targets = TARGETS if name.endswith("-lm") else None
    model = peft_model(name, **kwargs)
    model.get_base_model().set_attn_implementation("eager")  # fused attention defeats torch.func
    return LogitsModel(model, target_ids=targets).eval()


def loader(batch_size, likelihood="classification", **kwargs):
    batch = token_batch(LENGTHS, **kwargs)
    if likelihood == "regression":
        batch["labels"] = torch.randn(len(LENGTHS), 3, dtype=torch.float64)
    examples = [{key: value[n] for key, value in batch.items()} for n in range(len(LENGTHS))]
    return DataLoader(examples, batch_size=batch_size)


def fitted(cls, model, backend, likelihood="classification", **kwargs):
    torch.manual_seed(0)
    la = cls(model, likelihood, backend=backend, prior_precision=0.3, **kwargs)
    la.fit(loader(3, likelihood))
    return la


def assert_same_factors(ours, theirs):
    assert len(ours.kfacs) == len(theirs.kfacs)
    for X, Y in zip(ours.kfacs, theirs.kfacs, strict=True):
        assert len(X) == len(Y)
        for x, y in zip(X, Y, strict=True):
            assert_near(x, y)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_factors_evidence_and_predictive_equal_curvlinops(name):
    model = logits_model(name)
    ours, theirs = (fitted(KronLaplace, model, backend) for backend in (LoraGGN, CurvlinopsGGN))
    if not name.startswith("t5"):  # laplace-torch sorts by module, T5's decoder differs in order
        assert_same_factors(ours.H_facs, theirs.H_facs)
        assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
        batch = token_batch((4, 4), seed=3)
        for link in ("probit", "bridge"):
            assert_near(ours(batch, link_approx=link), theirs(batch, link_approx=link))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_regression_equals_curvlinops(name):
    model = logits_model(name)
    kwargs = {"likelihood": "regression", "sigma_noise": 0.5}
    ours = fitted(KronLaplace, model, LoraGGN, **kwargs)
    theirs = fitted(KronLaplace, model, CurvlinopsGGN, **kwargs)
    assert_near(ours.H_facs.to_matrix(), theirs.H_facs.to_matrix())
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    batch = token_batch((4, 4), seed=3)
    assert_near(ours(batch), theirs(batch))


@pytest.mark.parametrize("name", ["llama-lm", "bert"])
def test_empirical_fisher_equals_curvlinops(name):
    model = logits_model(name)
    ours, theirs = (fitted(KronLaplace, model, backend) for backend in (LoraEF, CurvlinopsEF))
    assert_same_factors(ours.H_facs, theirs.H_facs)


@pytest.mark.parametrize("name", ["llama", "gpt2-lm"])
def test_reduce_equals_curvlinops_up_to_its_scale(name):
    model = logits_model(name)
    batch = token_batch(LENGTHS)
    y = batch["labels"]
    _, ours = LoraGGN(model, "classification", kfac_approx="reduce").kron(batch, y, N=len(y))
    _, theirs = CurvlinopsGGN(model, "classification").kron(
        batch, y, N=len(y), kfac_approx="reduce"
    )
    assert_same_factors(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2-lm"])
@pytest.mark.parametrize("cls", [FullLaplace, DiagLaplace])
def test_full_and_diagonal_equal_curvlinops(name, cls):
    model = logits_model(name)
    ours, theirs = (fitted(cls, model, backend) for backend in (LoraGGN, CurvlinopsGGN))
    assert_near(ours.H, theirs.H)
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    batch = token_batch((4, 4), seed=3)
    assert_near(ours(batch), theirs(batch))


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_backend_of_plain_laplace(structure):
    model = logits_model("bert")
    la = Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure=structure,
        backend=LoraGGN,
    )
    la.fit(loader(3))
    la.optimize_prior_precision(n_steps=3)
    probabilities = la(token_batch((4, 4), seed=3))
    assert_near(probabilities.sum(-1), torch.ones(2).double())
    assert la.log_marginal_likelihood().isfinite()


def test_plain_laplace_takes_low_rank_factors_from_the_backend():
    model = logits_model("bert", r=1)
    kwargs = {"factor_rank": 2, "low_rank_threshold": 4}
    low = fitted(KronLaplace, model, LoraGGN, backend_kwargs=kwargs)
    low.fit(loader(3), override=False)
    dense = fitted(KronLaplace, model, LoraGGN)
    dense.fit(loader(3), override=False)
    assert_near(low.H_facs.diag().sum(), dense.H_facs.diag().sum())
    assert low(token_batch((4, 4))).isfinite().all()


def test_refitting_adds_up_as_laplace_torch_does():
    model = logits_model("bert")
    ours, theirs = (fitted(KronLaplace, model, backend) for backend in (LoraGGN, CurvlinopsGGN))
    for la in (ours, theirs):
        la.fit(loader(2, seed=5), override=False)
    assert_same_factors(ours.H_facs, theirs.H_facs)


def plain_net(outputs=3):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, outputs)
    )
    return net.double()


@pytest.mark.parametrize("backend", [BackPackGGN, AsdlGGN, CurvlinopsGGN])
def test_plain_nets_equal_every_backend(backend):
    net, X = plain_net(), torch.randn(9, 5, dtype=torch.float64)
    y = torch.arange(9) % 3
    _, ours = LoraGGN(net, "classification").kron(X, y, N=9)
    loss, theirs = backend(net, "classification").kron(X, y, N=9)
    assert_near(ours.to_matrix(), theirs.to_matrix())
    assert_near(LoraGGN(net, "classification").diag(X, y)[0], loss.double())


def test_gradients_and_jacobians_equal_torch_func():
    net, X = plain_net(), torch.randn(9, 5, dtype=torch.float64)
    for likelihood, y in (
        ("classification", torch.arange(9) % 3),
        ("regression", torch.randn(9, 3).double()),
    ):
        backend = LoraGGN(net, likelihood)
        for ours, theirs in zip(
            backend.gradients(X, y), super(LoraGGN.__mro__[1], backend).gradients(X, y), strict=True
        ):
            assert_near(ours, theirs)
        chosen = torch.tensor([[n % 3, 1] for n in range(9)])
        for ours, theirs in zip(
            backend.selected_output_jacobians(X, chosen),
            super(LoraGGN.__mro__[1], backend).selected_output_jacobians(X, chosen),
            strict=True,
        ):
            assert_near(ours, theirs)
        assert_near(backend.jacobians(X, enable_backprop=True)[0], backend.jacobians(X)[0])
