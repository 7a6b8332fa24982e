"""Fitting: batches, padding and parts do not count, and the model stays as it was."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.linalg.factors import DiagonalFactor
from support.batches import LENGTHS, loader, token_batch
from support.exact_posteriors import BOTH, NEW_BATCH, exact_posterior
from support.models import peft_model
from support.posteriors import CLASSES, posterior
from support.references import assert_near


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_the_fit_does_not_depend_on_batches_and_padding(cls, kwargs):
    reference = posterior(cls, **kwargs)
    batch = token_batch((4, 2), seed=9)
    for data in (loader(1), loader(7), loader(2, pad_to=11, side="left"), loader(5, pad_to=9)):
        la = posterior(cls, fit=False, **kwargs)
        la.fit(data)
        assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
        assert_near(la(batch), reference(batch))


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_fitting_on_parts_equals_fitting_on_the_whole(cls, kwargs):
    whole = posterior(cls, **kwargs)
    parts = posterior(cls, fit=False, **kwargs)
    examples = loader().dataset
    parts.fit(DataLoader(examples[:2], batch_size=2), override=False)
    parts.fit(DataLoader(examples[2:], batch_size=2), override=False)
    assert parts.n_data == whole.n_data == len(LENGTHS)
    assert_near(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert_near(parts(token_batch((4, 2))), whole(token_batch((4, 2))))
    parts.fit(loader())
    assert parts.n_data == len(LENGTHS)
    assert_near(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_fit_leaves_modes_weights_and_gradients_alone(cls, kwargs):
    la = posterior(cls, fit=False, **kwargs)
    la.model.train()
    frozen = la.model.model.get_submodule("base_model.model.model.layers.0.mlp")
    frozen.eval()
    for p in la.params:
        p.grad = torch.ones_like(p)
    modes = [module.training for module in la.model.modules()]
    weights = parameters_to_vector(la.model.parameters()).clone()
    la.fit(loader())
    la(token_batch((4, 2)))
    la(token_batch((4, 2)), pred_type="nn", link_approx="mc", n_samples=2)
    assert [module.training for module in la.model.modules()] == modes
    torch.testing.assert_close(parameters_to_vector(la.model.parameters()), weights, rtol=0, atol=0)
    assert all((p.grad == 1).all() for p in la.params)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in la.model.modules())


def test_progress_is_shown_on_request(capsys):
    la = posterior(fit=False)
    la.fit(loader())
    assert not capsys.readouterr().err
    la.fit(loader(), progress_bar=True)
    assert "Fitting the posterior" in capsys.readouterr().err


def test_pairs_of_tensors_are_batches_too():
    batch = token_batch((5,) * 6)
    pairs = torch.utils.data.TensorDataset(batch["input_ids"], batch["labels"])
    la = posterior(name="bert", fit=False)
    la.fit(DataLoader(pairs, batch_size=4))
    reference = posterior(name="bert", fit=False)
    reference.fit(loader(4, lengths=(5,) * 6))
    assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())


def test_regression_targets_may_be_flat():
    la = KronLoraLaplace(peft_model("bert", num_labels=1), "regression")
    batch = token_batch((5,) * 4)
    flat = [dict({k: v[n] for k, v in batch.items()}, labels=float(n)) for n in range(4)]
    la.fit(DataLoader(flat, batch_size=2))
    mean, variance = la(batch)
    assert mean.shape == (4, 1) and variance.shape == (4, 1, 1)
    assert la.n_outputs == 1


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_a_failed_fit_leaves_the_earlier_posterior(cls, kwargs):
    la = exact_posterior(cls, **kwargs)
    before = la(NEW_BATCH)
    original = la.engine.root_blocks
    calls = []

    def broken(x, y, gradient=None):
        loss, blocks = original(x, y, gradient)
        calls.append(1)
        scale = torch.inf if len(calls) == 2 else 1.0
        return loss, (block * scale for block in blocks)

    la.engine.root_blocks = broken
    with pytest.raises(FloatingPointError, match=r"batch 1 .*lora_A.*not finite"):
        la.fit(loader())
    del la.engine.root_blocks
    assert torch.equal(la(NEW_BATCH), before) and la.n_data == len(LENGTHS)


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
