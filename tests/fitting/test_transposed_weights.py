"""Weights that are stored as ``(in, out)``, GPT-2's, are fitted in parts as in one go."""

import pytest
from laplace import Laplace
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from support.batches import loader, token_batch
from support.interruptions import Interrupted, Interruption
from support.models import excite, peft_model
from support.posteriors import DENSE, LOW
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)
DATA = loader().dataset
REDUCE = {**DENSE, "backend_kwargs": {"kfac_approx": "reduce"}}


def model():
    return excite(peft_model("gpt2", modules_to_save=["c_fc", "score"]))


def part(some):
    return DataLoader(some, batch_size=2)


@pytest.mark.parametrize("kwargs", [DENSE, LOW, REDUCE])
def test_unequal_parts_equal_one_fit(kwargs):
    net = model()
    whole, *parts = (KronLoraLaplace(net, "classification", **kwargs) for _ in range(4))
    whole.fit(part(DATA))
    for la, some in zip(parts, (DATA[:1], DATA[1:3], DATA[:2]), strict=True):
        la.fit(part(some))
    parts[0].merge([parts[1]])
    parts[0].fit(part(DATA[3:]), override=False)
    parts[2].fit(part(DATA[2:]), override=False)
    for la in (parts[0], parts[2]):
        assert_near(la.log_marginal_likelihood(), whole.log_marginal_likelihood())
        assert_near(la(BATCH), whole(BATCH))


def test_plain_laplace_torch_sees_one_fit_in_unequal_parts():
    net = LogitsModel(model())
    options = {"subset_of_weights": "all", "hessian_structure": "kron", "backend": LoraGGN}
    whole, parts = (Laplace(net, "classification", **options) for _ in range(2))
    whole.fit(part(DATA))
    parts.fit(part(DATA[:1]))
    parts.fit(part(DATA[1:]), override=False)
    assert_near(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())


def test_a_corrected_posterior_in_parts_has_the_eigenvectors_of_one_fit():
    net = model()
    whole, parts = (
        KronLoraLaplace(net, "classification", eigenvalue_correction=True, **DENSE)
        for _ in range(2)
    )
    whole.fit(part(DATA))
    parts.fit(part(DATA[:1]))
    parts.fit(part(DATA[1:]), override=False)
    factors = (la.state.curvature.factors.to_matrix() for la in (parts, whole))
    assert_near(*factors)


def test_parts_of_which_one_was_interrupted_equal_one_fit(tmp_path):
    net = model()
    whole, parts = (KronLoraLaplace(net, "classification", **DENSE) for _ in range(2))
    whole.fit(part(DATA))
    parts.fit(part(DATA[:1]))
    options = {"override": False, "checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Interruption):
        parts.fit(Interrupted(part(DATA[1:]), 2), **options)
    parts.fit(part(DATA[1:]), **options)
    assert_near(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())


def test_the_second_factor_is_a_mean_and_a_biass_a_sum():
    la = KronLoraLaplace(model(), "classification", **DENSE)
    la.fit(part(DATA))
    blocks = dict(zip(la.block_names, la.state.curvature.factors.kfacs, strict=True))
    for name, factors in blocks.items():
        if "c_fc" in name and name.endswith("weight"):
            bias = blocks[name.removesuffix("weight") + "bias"]
            assert_near(factors[1].matrix * la.n_data, bias[0].matrix)
