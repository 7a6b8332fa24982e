"""Sampled weights leave the model as it was, and generators fix them."""

import types

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from support.batches import token_batch
from support.posteriors import CLASSES, posterior

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
BATCH = token_batch((4, 2, 6), seed=9)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_generators_fix_the_samples(cls, kwargs):
    la = posterior(cls, **kwargs)
    for options in ({}, {"diagonal_output": True}, {"pred_type": "nn"}):
        options = {**options, "link_approx": "mc", "n_samples": 3}
        first, second, other = (
            la(BATCH, generator=torch.Generator().manual_seed(seed), **options)
            for seed in (0, 0, 1)
        )
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert not torch.equal(first, other)
    for query in (la.functional_samples, la.predictive_samples):
        generators = (torch.Generator().manual_seed(0) for _ in range(2))
        first, second = (query(BATCH, n_samples=3, generator=g) for g in generators)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert first.shape == (3, 3, 3)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_sampled_weights_agree_with_the_linearised_model_for_a_tight_posterior(cls, kwargs):
    la = posterior(cls, name="bert", prior_precision=1e3, **kwargs)
    nn = la(BATCH, pred_type="nn", link_approx="mc", n_samples=300)
    glm = la(BATCH, link_approx="mc", n_samples=3000)
    torch.testing.assert_close(nn, glm, atol=0.02, rtol=0)
    functions = la.functional_samples(BATCH, pred_type="nn", n_samples=5)
    assert functions.shape == (5, 3, 3)
    assert not torch.equal(functions[0], functions[1])


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_a_failing_sample_leaves_the_weights_to_the_bit(cls, kwargs):
    la = posterior(cls, dtype=torch.float32, **kwargs)
    weights = parameters_to_vector(la.model.parameters()).clone()
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = la.model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        la(BATCH, pred_type="nn", link_approx="mc", n_samples=5)
    handle.remove()
    assert len(calls) == 3
    torch.testing.assert_close(parameters_to_vector(la.model.parameters()), weights, rtol=0, atol=0)


def test_a_forward_pass_that_was_put_around_the_models_own_is_sampled():
    """Its closure holds the model, which a copy of the model would run instead of itself."""
    la = posterior(name="bert")

    def sampled():
        generator = torch.Generator().manual_seed(0)
        return la(BATCH, "nn", link_approx="mc", n_samples=3, generator=generator)

    expected = sampled()
    base = la.logits_model.model.get_base_model()
    own = base.forward

    def around(self, *args, **kwargs):
        return own(*args, **kwargs)

    base.forward = types.MethodType(around, base)
    found = sampled()
    assert torch.equal(found, expected)
    assert (found - la(BATCH)).norm() > 1e-6
