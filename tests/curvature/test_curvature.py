"""Full and diagonal curvature of the backends, against explicit loops."""

import pytest
import torch
from laplace import Laplace
from torch import nn

from laplace_lora import KronLoraLaplace, LogitsModel, LoraEF, LoraGGN
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import loader, token_batch
from support.models import excite, logits_model, peft_model
from support.references import assert_near, block_diagonal_part, explicit_ggn, explicit_jacobians
from support.uncovered import uncovered_model

LENGTHS = (3, 6, 4, 6, 1)
BATCH = token_batch((4, 2, 5))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2-lm", "t5-lm"])
def test_full_and_diagonal_equal_the_explicit_ggn(name):
    model, batch = logits_model(name), token_batch(LENGTHS)
    backend = LoraGGN(model, "classification")
    exact = explicit_ggn(model, batch)
    loss, full = backend.full(batch, batch["labels"])
    assert_near(full, exact)
    assert_near(backend.diag(batch, batch["labels"])[1], exact.diagonal())
    expected = nn.functional.cross_entropy(model(batch), batch["labels"], reduction="sum")
    assert_near(loss, expected.detach())


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        (LoraGGN, {"stochastic": True, "num_samples": 0}, "must be at least 1"),
        (LoraGGN, {"num_samples": 4}, "are drawn with stochastic=True only"),
        (LoraEF, {"num_samples": 4}, "LoraEF takes the observed labels"),
        (LoraEF, {"stochastic": True}, "LoraEF takes the observed labels"),
        (LoraGGN, {"factor_rank": 2, "residual": "zero"}, r"\['factor_rank', 'residual'\] in"),
    ],
)
def test_arguments_without_effect_are_refused(backend, options, message):
    with pytest.raises(ValueError, match=message):
        KronLoraLaplace(
            peft_model("bert"), "classification", backend=backend, backend_kwargs=options
        )


def test_monte_carlo_fisher_is_unbiased_and_its_samples_count():
    model, batch = logits_model("bert"), token_batch((4, 4))
    y = batch["labels"]
    exact = LoraGGN(model, "classification").diag(batch, y)[1]
    torch.manual_seed(0)
    errors = []
    for samples in (1, 400):
        backend = LoraGGN(model, "classification", stochastic=True, num_samples=samples)
        errors.append((backend.diag(batch, y)[1] - exact).norm() / exact.norm())
    assert errors[1] < 0.15 < errors[0]


def test_empirical_fisher_uses_the_labels():
    model, batch = logits_model("bert"), token_batch((4, 4))
    y = batch["labels"]
    gradients, _ = LoraEF(model, "classification").gradients(batch, y)
    _, full = LoraEF(model, "classification").full(batch, y)
    assert_near(full, gradients.T @ gradients)
    assert_near(LoraEF(model, "classification").diag(batch, y)[1], full.diagonal())
    other = LoraEF(model, "classification").diag(batch, (y + 1) % 3)[1]
    assert not torch.allclose(full.diagonal(), other)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"modules_to_save": ["classifier"], "target_modules": ["query"]},
        {"target_modules": "all-linear", "modules_to_save": None},
        {"bias": "lora_only"},
    ],
)
def test_adapter_kinds_equal_the_explicit_ggn(kwargs):
    model, batch = logits_model("bert", **kwargs), token_batch(LENGTHS)
    backend = LoraGGN(model, "classification")
    assert_near(backend.full(batch, batch["labels"])[1], explicit_ggn(model, batch))
    one = token_batch((1,))
    exact = block_diagonal_part(explicit_ggn(model, one), model)
    assert_near(backend.kron(one, one["labels"], N=1)[1].to_matrix(), exact)


def test_trained_conv1d_is_covered_as_it_is_stored():
    model = peft_model("gpt2", target_modules=["c_proj"], modules_to_save=["c_attn", "score"])
    model = LogitsModel(excite(model)).eval()
    backend = LoraGGN(model, "classification")
    assert any(linear.transposed for linear in backend.maps)
    one = token_batch((1,))
    exact = block_diagonal_part(explicit_ggn(model, one), model)
    assert_near(backend.kron(one, one["labels"], N=1)[1].to_matrix(), exact)


def test_subnetworks_select_from_full_diagonal_and_jacobians():
    model, batch = logits_model("bert"), token_batch((4, 4))
    indices = torch.tensor([3, 0, 17])
    whole = LoraGGN(model, "classification")
    part = LoraGGN(model, "classification", subnetwork_indices=indices)
    y = batch["labels"]
    full = whole.full(batch, y)[1]
    assert_near(part.full(batch, y)[1], full[indices][:, indices])
    assert_near(part.diag(batch, y)[1], full.diagonal()[indices])
    assert_near(part.jacobians(batch)[0], whole.jacobians(batch)[0][..., indices])
    with pytest.raises(ValueError, match="cannot cover a subnetwork"):
        part.kron(batch, y, N=2)


def test_a_map_without_influence_has_no_curvature():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    net, X = Idle(), torch.randn(3, 4)
    backend = LoraGGN(net, "regression")
    _, full = backend.full(X, torch.zeros(3, 2))
    assert full[:10, :10].any()
    assert not full[10:].any()
    assert not backend.kron(X, torch.zeros(3, 2), N=3)[1].to_matrix()[10:].any()


def test_all_answers_of_the_backend_agree():
    model = uncovered_model("deberta")
    backend = LoraGGN(model, "classification", uncovered="diag")
    J = torch.cat([j.flatten(2) for j in explicit_jacobians(model, BATCH)], -1)
    y = BATCH["labels"]
    f = model(BATCH).detach()
    rows = torch.einsum("knc,ncp->nkp", softmax_root(f), J).flatten(0, 1)
    assert_near(backend.full(BATCH, y)[1], rows.T @ rows)
    assert_near(backend.diag(BATCH, y)[1], rows.square().sum(0))
    assert_near(backend.jacobians(BATCH)[0], J)
    residual = f.softmax(-1) - torch.nn.functional.one_hot(y, 3)
    assert_near(backend.gradients(BATCH, y)[0], torch.einsum("nc,ncp->np", residual, J))


def test_plain_laplace_torch_holds_vectors_and_refuses_matrices():
    model = uncovered_model("dora")
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
    backend = LoraGGN(uncovered_model("norms of bert"), "classification", uncovered="diag")
    with pytest.raises(ValueError, match=r"plain Kron cannot hold .*position_embeddings"):
        backend.kron(BATCH, BATCH["labels"], N=3)
