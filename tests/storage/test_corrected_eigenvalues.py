"""Saved corrected eigenvalues: bit for bit, refused when forged."""

import json

import pytest
import torch
from safetensors.torch import load_file

from laplace_lora import KronLoraLaplace
from laplace_lora.storage.files import TENSORS
from support.batches import loader, token_batch
from support.corrected_posteriors import OPTIONS, ZERO, corrected_posterior, fit_corrected
from support.forgery import forge_tensors
from support.models import peft_model
from support.posteriors import LOW
from support.references import assert_near
from support.sweeps import rest_slow

BATCH = token_batch((4, 2), seed=3)


@pytest.mark.parametrize("kwargs", rest_slow(OPTIONS, 0, 1))
def test_a_posterior_comes_back_bit_for_bit(kwargs, tmp_path):
    la = fit_corrected(**kwargs)
    la.optimize_prior_precision()
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.logits_model.model, tmp_path)
    assert again.arguments() == la.arguments()
    restored = corrected_posterior(la.logits_model.model, **kwargs)
    restored.load_state_dict(la.state_dict())
    for other in (again, restored):
        assert torch.equal(other(BATCH), la(BATCH))
        assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
        other.fit(loader(2, seed=5), override=False)
        assert other.n_data == 2 * la.n_data
    assert_near(again.H.to_matrix(), restored.H.to_matrix())


def test_state_dicts_keep_the_residual():
    la = fit_corrected(correct=False, **ZERO)
    other = corrected_posterior(correct=False, **ZERO)
    other.load_state_dict(la.state_dict())
    assert torch.equal(other(BATCH), la(BATCH))


@pytest.mark.parametrize("kind", ["negative", "shape", "missing", "extra", "nan", "flat"])
def test_forged_eigenvalues_are_refused(kind, tmp_path):
    la = fit_corrected(**LOW)
    la.save_pretrained(tmp_path, precision="exact")

    def change(tensors):
        name = "curvature.eigenvalues.1"
        if kind == "negative":
            tensors[name].view(-1)[0] = -1.0
        elif kind == "shape":
            tensors[name] = tensors[name][:-1]
        elif kind == "missing":
            del tensors[name]
        elif kind == "nan":
            tensors[name].view(-1)[0] = torch.nan
        elif kind == "flat":
            tensors[name] = tensors[name].flatten()
        else:
            tensors["curvature.eigenvalues.99"] = torch.ones(2, 2)

    forge_tensors(tmp_path, change)
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


def test_tables_without_the_option_are_refused(tmp_path):
    fit_corrected(correct=False, **LOW).save_pretrained(tmp_path)
    assert not any("eigenvalues" in name for name in load_file(tmp_path / TENSORS))
    config = json.loads((tmp_path / "laplace_config.json").read_text())
    assert config["arguments"]["eigenvalue_correction"] is False
    forge_tensors(tmp_path, lambda t: t.update({"curvature.eigenvalues.0": torch.ones(2, 2)}))
    with pytest.raises(ValueError, match="another eigenvalue_correction"):
        KronLoraLaplace.from_pretrained(peft_model("bert"), tmp_path)
