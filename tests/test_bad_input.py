"""Bad input: an error that says what to do, and nothing lost."""

import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from peft import LoraConfig
from test_posterior import CLASSES, LOW, loader, posterior
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from tiny import TARGETS, adapter_config, assert_near, peft_model, token_batch

BATCH = token_batch((4, 2), seed=9)


def fails_without_harm(la, data, error, match):
    """Provoke an error in `fit`; posterior, hooks, modes and weights must be as before."""
    la.model.train()
    before = la(BATCH), la.log_marginal_likelihood(), la.n_data
    weights = [p.detach().clone() for p in la.model.parameters()]
    for override in (True, False):
        with pytest.raises(error, match=match):
            la.fit(data, override=override)
    assert all(module.training for module in la.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in la.model.modules())
    for p, weight in zip(la.model.parameters(), weights, strict=True):
        torch.testing.assert_close(p, weight, rtol=0, atol=0)
    assert la.n_data == before[2]
    torch.testing.assert_close(la(BATCH), before[0], rtol=0, atol=0)
    torch.testing.assert_close(la.log_marginal_likelihood(), before[1], rtol=0, atol=0)


def spoiled(**changes):
    """A good batch followed by a bad one."""
    data = loader().dataset
    bad = {**data[-1], **changes}
    return DataLoader([*data[:-1], {k: v for k, v in bad.items() if v is not None}], batch_size=1)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"labels": None}, ValueError, "no 'labels', only"),
        ({"labels": torch.tensor(3)}, ValueError, r"labels must lie in 0\.\.2"),
        ({"labels": torch.tensor(-100)}, ValueError, r"labels must lie in 0\.\.2"),
        ({"labels": torch.tensor(0.5)}, ValueError, "one integer label"),
        ({"input_ids": torch.tensor([999] * 6)}, IndexError, "index"),
    ],
)
def test_bad_batches(cls, kwargs, changes, error, match):
    fails_without_harm(posterior(cls, **kwargs), spoiled(**changes), error, match)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_a_loss_that_is_not_finite_names_the_batch(cls, kwargs):
    la = posterior(cls, **kwargs)
    calls = []

    def poison(module, args, output):
        calls.append(1)
        return output * float("nan") if len(calls) % 2 == 0 else output

    original = la.model.model.forward

    def poisoned(*args, **kwargs):
        returned = original(*args, **kwargs)
        returned.logits = poison(None, None, returned.logits)
        return returned

    before = la(BATCH)
    la.model.model.forward = poisoned
    with pytest.raises(FloatingPointError, match="batch 1 of the training data: the loss is nan"):
        la.fit(loader())
    del la.model.model.forward
    torch.testing.assert_close(la(BATCH), before, rtol=0, atol=0)


def test_a_factor_that_is_not_finite_names_the_layer():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            # sqrt is finite at zero, its derivative is not.
            return self.second(self.first(x).abs().mul(0).sqrt())

    la = KronLoraLaplace(LogitsModel(Steep()), "classification")
    data = torch.utils.data.TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(FloatingPointError, match=r"batch 0.*layer 'model\.first' is not finite"):
        la.fit(DataLoader(data, batch_size=2))


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_loaders_that_are_none(cls, kwargs):
    la = posterior(cls, **kwargs)
    fails_without_harm(la, DataLoader([], batch_size=2), ValueError, "loader is empty")
    fails_without_harm(la, list(loader()), TypeError, "needs a DataLoader")
    words = DataLoader(["a", "b"], batch_size=2, collate_fn=lambda x: x[0])
    fails_without_harm(la, words, TypeError, "must be a mapping")


def test_a_stream_of_unknown_length_is_a_loader_too():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    la, reference = posterior(fit=False, **LOW), posterior(**LOW)
    la.fit(DataLoader(Stream(), batch_size=4))
    assert la.n_data == reference.n_data
    assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())


def test_a_loader_that_drops_examples_counts_what_it_gave():
    la, reference = posterior(fit=False, **LOW), posterior(fit=False, **LOW)
    data = loader().dataset
    la.fit(DataLoader(data, batch_size=5, drop_last=True))
    reference.fit(DataLoader(data[:5], batch_size=5))
    assert la.n_data == 5
    assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())


def test_models_without_a_trainable_adapter():
    model = peft_model("bert")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        KronLoraLaplace(model.get_base_model(), "classification")


@pytest.mark.parametrize(
    ("name", "kwargs", "leftover"),
    [
        ("bert", {"bias": "all"}, "LayerNorm.bias"),
        ("bert", {"use_dora": True}, "lora_magnitude_vector"),
        ("bert", {"target_modules": ["word_embeddings"], "use_dora": True}, "lora_embedding_A"),
    ],
)
def test_trainable_tensors_that_no_factor_covers_are_named(name, kwargs, leftover):
    model = peft_model(name, **kwargs)
    with pytest.raises(ValueError, match=rf"(?s)no Kronecker factor covers.*{leftover}.*Freeze"):
        KronLoraLaplace(model, "classification")


def test_tied_trainable_weights_are_named():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' are shared by several modules"):
        LoraGGN(net, "classification")


def test_modules_that_run_twice_or_never_are_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) + self.layer(x.unsqueeze(1).repeat(1, 2, 1)).sum(1)

    net = Twice()
    with pytest.raises(RuntimeError, match="'idle' did not run"):
        net.layer.requires_grad_(False)
        LoraGGN(net, "classification").jacobians(torch.randn(2, 3))
    net.layer.requires_grad_(True)
    net.idle.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'layer' ran 2 times .* of different shapes"):
        LoraGGN(net, "classification").jacobians(torch.randn(2, 3))


def test_inputs_without_a_batch_dimension_are_named():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x.reshape(-1, 3)).reshape(len(x), -1)

    with pytest.raises(RuntimeError, match=r"'layer' received an input of shape \(4, 3\)"):
        LoraGGN(Folded(), "classification").jacobians(torch.randn(2, 6))


def test_masks_that_do_not_fit_the_tokens_are_refused():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch):
            return self.layer(batch["x"]).mean(1)

    batch = {"x": torch.randn(2, 5, 3), "attention_mask": torch.ones(2, 4)}
    with pytest.raises(ValueError, match="'layer' saw 5 tokens"):
        LoraGGN(Pooled(), "classification").kron(batch, torch.tensor([0, 1]), N=2)


def test_adapters_that_do_not_run_are_refused():
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged into"):
        la.fit(loader())
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        la(BATCH)
    with pytest.raises(RuntimeError, match="merged into"):
        KronLoraLaplace(model, "classification")
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="are disabled"):
        la(BATCH)
    assert la(BATCH).isfinite().all()


def test_two_active_adapters_are_refused():
    model = peft_model("llama-lm")
    model.add_adapter("second", adapter_config("llama-lm"))
    KronLoraLaplace(model, "classification", target_ids=TARGETS)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RuntimeError, match="active together"):
        KronLoraLaplace(model, "classification", target_ids=TARGETS)


def test_arguments_out_of_range():
    model = LogitsModel(peft_model("bert"))
    for kwargs, match in (
        ({"factor_rank": 0}, "factor_rank must be positive"),
        ({"residual": "some"}, "residual must be one of"),
        ({"damping": True}, "damping is not supported"),
        ({"backend_kwargs": {"kfac_approx": "exact"}}, "kfac_approx must be one of"),
        ({"target_ids": [1, 2]}, "LogitsModel already"),
    ):
        with pytest.raises(ValueError, match=match):
            KronLoraLaplace(model, "classification", **kwargs)
    with pytest.raises(TypeError, match="backend must be LoraGGN"):
        KronLoraLaplace(model, "classification", backend=CurvlinopsGGN)
    with pytest.raises(TypeError):
        KronLoraLaplace(model, "classification", no_such_argument=1)


def test_a_tuning_that_fails_keeps_the_prior():
    la = posterior(prior_precision=2.5, **LOW)
    with pytest.raises(ValueError, match="needs `val_loader`"):
        la.optimize_prior_precision(method="gridsearch")
    with pytest.raises(ValueError, match="method must be 'marglik'"):
        la.optimize_prior_precision(method="guess")
    broken = DataLoader([{"input_ids": torch.ones(3, dtype=torch.long)}], batch_size=1)
    with pytest.raises(ValueError, match="no 'labels'"):
        la.optimize_prior_precision(method="gridsearch", val_loader=broken, grid_size=3)
    assert la.prior_precision.item() == 2.5
    with pytest.raises(AttributeError, match="not fitted"):
        posterior(fit=False).optimize_prior_precision()


def test_grid_search_works_on_batches_with_labels():
    la = posterior(**LOW)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(), grid_size=5)
    assert la.prior_precision.item() in torch.logspace(-4, 4, 5).tolist()


def test_lora_config_is_peft_s():
    assert isinstance(adapter_config("bert"), LoraConfig)
