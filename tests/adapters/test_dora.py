"""DoRA: the directional part has Kronecker factors, the magnitudes stay where they are."""

import pytest
import torch
from peft.helpers import DoraCaching

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import loader, token_batch
from support.models import freeze_magnitudes, peft_model
from support.references import assert_near, explicit_jacobians


def dora(name="bert", **kwargs):
    return LogitsModel(freeze_magnitudes(peft_model(name, use_dora=True, **kwargs))).eval()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_jacobians_equal_jacrev(name):
    model, batch = dora(name), token_batch((4, 2, 5))
    _, blocks = LoraGGN(model, "classification").engine.jacobian_blocks(batch)
    assert_near(list(blocks), explicit_jacobians(model, batch))


def test_kfac_is_the_ggn_of_one_example_with_one_token():
    model, batch = dora(modules_to_save=None), token_batch((1,))
    _, kron = LoraGGN(model, "classification").kron(batch, batch["labels"], N=1)
    roots = softmax_root(model(batch).detach())[:, 0]
    for factors, jacobian in zip(kron.kfacs, explicit_jacobians(model, batch), strict=True):
        J = roots @ jacobian[0].flatten(1)
        assert_near(torch.kron(*factors), J.T @ J)


def test_magnitudes_are_refused_by_name_until_frozen():
    model = peft_model("bert", use_dora=True)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*Freeze them first"):
        KronLoraLaplace(model, "classification")
    la = KronLoraLaplace(dora(), "classification")
    la.fit(loader())
    la.optimize_prior_precision()
    assert_near(la(token_batch((3, 2))).sum(-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "options", [{"pred_type": "nn", "link_approx": "mc"}, {"method": "sampled"}]
)
def test_samples_have_norms_of_their_own_where_peft_keeps_norms(options):
    """In `DoraCaching` PEFT takes the norms of the first pass, whatever the weights are since."""
    la, batch = KronLoraLaplace(dora(), "classification"), token_batch((4, 2, 5))
    la.fit(loader())

    def sampled():
        return la(batch, n_samples=8, generator=torch.Generator().manual_seed(0), **options)

    expected = sampled()
    with DoraCaching():
        outputs = la.model(batch)  # which fills the caches
        assert_near(sampled(), expected)
        assert_near(la.model(batch), outputs)
        layer = next(m for m in la.model.modules() if hasattr(m, "_dora_cache"))
        assert layer._dora_cache, "PEFT no longer caches: the test says nothing"
