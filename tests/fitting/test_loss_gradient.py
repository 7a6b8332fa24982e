"""The gradient of the summed loss that a fit collects, against plain autograd."""

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LoraEF,
    LowRankLoraLaplace,
)
from laplace_lora.curvature.loss_gradient import ResidualColumns
from laplace_lora.likelihoods.classification import Classification
from laplace_lora.likelihoods.roots import softmax_residual, softmax_root
from laplace_lora.models.changes.modes import evaluation_mode
from support.batches import loader
from support.interruptions import Interrupted, Interruption
from support.language import language_posterior, text_loader
from support.models import TARGETS, peft_model
from support.preferences import pair_loader, reward_posterior
from support.references import assert_near
from support.uncovered import UNCOVERED

CLASSES = [
    (KronLoraLaplace, {"factor_rank": None}),
    (KronLoraLaplace, {"factor_rank": 2, "low_rank_threshold": 4}),
    (KronLoraLaplace, {"eigenvalue_correction": True}),
    (KronLoraLaplace, {"backend_kwargs": {"kfac_approx": "reduce"}}),
    (KronLoraLaplace, {"backend_kwargs": {"stochastic": True, "num_samples": 2}}),
    (KronLoraLaplace, {"backend": LoraEF}),
    (DiagLoraLaplace, {}),
    (DiagLoraLaplace, {"backend": LoraEF}),
    (FullLoraLaplace, {}),
    (FullLoraLaplace, {"backend_kwargs": {"stochastic": True}}),
    (LowRankLoraLaplace, {"rank": 3}),
    (KronLoraLLLaplace, {}),
    (DiagLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
]


def reference(la, batches):
    """The gradient of the summed loss by one plain backward pass per batch."""
    total = 0.0
    with evaluation_mode(la.model):
        for batch in batches:
            x, y = la.parts.split(la.parts.by_example(batch))
            loss = la.parts.objective.nll(la.model(x), y)
            grads = torch.autograd.grad(loss, la.params, allow_unused=True)
            parts = [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(la.params, grads, strict=True)
            ]
            total = total + torch.cat(parts)
    return total


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("name", ["llama-lm", "bert", "gpt2"])
def test_it_is_autograds(cls, kwargs, name):
    if name.endswith("-lm") and "LL" in cls.__name__:
        pytest.skip("answer tokens have no head of the adapter's")
    targets = TARGETS if name.endswith("-lm") else None
    la = cls(peft_model(name), "classification", target_ids=targets, **kwargs)
    la.fit(loader())
    stochastic = kwargs.get("backend_kwargs", {}).get("stochastic", False)
    assert (la.state.loss_gradient is None) == stochastic  # it would take a pass of its own
    la.measure_gradient_term()
    tolerance = 1e-6 if "llama" in name else 1e-9  # Llama normalises in single precision
    assert_near(la.state.loss_gradient, reference(la, loader()), tolerance)


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace])
def test_of_other_likelihoods(cls):
    la = cls(peft_model("bert"), "regression")
    la.fit(loader(likelihood="regression"))
    expected = reference(la, loader(likelihood="regression"))
    assert_near(la.state.loss_gradient, expected, 1e-9)
    la = reward_posterior(cls, "bert")
    assert_near(la.state.loss_gradient, reference(la, pair_loader()), 1e-9)
    for kwargs in ({}, {"backend_kwargs": {"stochastic": False}}):
        la = language_posterior(cls, "gpt2-lm", **kwargs)
        la.measure_gradient_term()
        assert_near(la.state.loss_gradient, reference(la, text_loader()), 1e-9)


@pytest.mark.parametrize("name", list(UNCOVERED))
def test_of_tensors_that_no_factor_covers(name):
    la = KronLoraLaplace(
        UNCOVERED[name](),
        "classification",
        target_ids=TARGETS if "t5" in name else None,
        uncovered="diag",
    )
    la.fit(loader())
    tolerance = 1e-6 if any(kind in name for kind in ("llama", "t5")) else 1e-9
    assert_near(la.state.loss_gradient, reference(la, loader()), tolerance)


def test_exact_roots_need_no_further_backward_pass():
    torch.manual_seed(0)
    f, y = 3 * torch.randn(50, 4), torch.randint(4, (50,))
    root = softmax_root(f)
    weights = Classification().residual_weights(root, f, y)
    columns = ResidualColumns(root, softmax_residual(f, y), weights, 50)
    assert len(columns.columns) == columns.roots == 3
    wrong = ResidualColumns(root, softmax_residual(f, y), weights * 1.01, 50)
    assert len(wrong.columns) == 4 and wrong.roots == 3


def test_labels_too_unlikely_for_the_weights_take_one_more_pass():
    f, y = torch.tensor([[0.0, 40.0, 1.0]]), torch.tensor([0])
    root, residual = softmax_root(f), softmax_residual(f, y)
    columns = ResidualColumns(root, residual, Classification().residual_weights(root, f, y), 1)
    combined = torch.einsum("kn,knc->nc", columns.weights, columns.columns.to(columns.weights))
    assert_near(combined, residual[0], 1e-4)


def test_it_adds_up_over_loaders_and_posteriors():
    whole = KronLoraLaplace(peft_model("bert"), "classification")
    whole.fit(loader())
    twice = KronLoraLaplace(peft_model("bert"), "classification")
    twice.fit(loader())
    twice.fit(loader(), override=False)
    assert_near(twice.state.loss_gradient, 2 * whole.state.loss_gradient, 1e-12)
    other = KronLoraLaplace(peft_model("bert"), "classification")
    other.fit(loader())
    other.merge([whole])
    assert_near(other.state.loss_gradient, 2 * whole.state.loss_gradient, 1e-12)
    whole.adopt(whole.curvature, 4, loader())
    assert whole.state.loss_gradient is None


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace])
def test_an_interrupted_fit_and_files_keep_it(cls, tmp_path):
    la = cls(peft_model("bert"), "classification")
    with pytest.raises(Interruption):
        data = Interrupted(loader(batch_size=1), 2)
        la.fit(data, checkpoint_dir=tmp_path, checkpoint_every=1)
    la.fit(loader(batch_size=1), checkpoint_dir=tmp_path)
    expected = reference(la, loader())
    assert_near(la.state.loss_gradient, expected, 1e-9)
    la.save_pretrained(tmp_path, precision="exact")
    loaded = cls.from_pretrained(peft_model("bert"), tmp_path)
    assert torch.equal(loaded.state.loss_gradient, la.state.loss_gradient)
    again = cls(peft_model("bert"), "classification")
    again.load_state_dict(la.state_dict())
    assert torch.equal(again.state.loss_gradient, la.state.loss_gradient)


@pytest.mark.parametrize(("loss", "columns"), [(5.0, 1), (25.0, 2), (180.0, 2)])
def test_weights_that_single_and_half_precision_do_not_bear_are_not_taken(loss, columns):
    """A column of the root is as small as its weight is large."""
    f, y = torch.tensor([[0.0, loss]]), torch.tensor([0])
    objective = Classification()
    root, residual = objective.root(f, y), objective.residual(f, y)
    found = ResidualColumns(root, residual, objective.residual_weights(root, f, y), 1)
    assert len(found.columns) == columns
    weights, sent = found.weights.float(), found.columns.half().float()
    gradient = torch.einsum("kn,knc->nc", weights, sent)
    torch.testing.assert_close(gradient, residual[0], rtol=1e-3, atol=1e-3)
