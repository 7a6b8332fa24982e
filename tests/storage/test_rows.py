"""Saved rows of the exact posteriors: bit for bit, in any storage, refused when forged."""

import json

import pytest
import torch

from laplace_lora import FullLoraLaplace
from laplace_lora.storage.files import CONFIG
from support.batches import loader
from support.exact_posteriors import BOTH, NEW_BATCH, exact_posterior
from support.forgery import forge, forge_tensors


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_a_posterior_comes_back_bit_for_bit(cls, kwargs, tmp_path):
    la = exact_posterior(cls, **kwargs)
    la.optimize_prior_precision(prior_structure="matrix")
    la.calibrate(loader())
    before = la(NEW_BATCH)
    la.save_pretrained(tmp_path, precision="exact")
    again = cls.from_pretrained(la.logits_model.model, tmp_path)
    packed, found = (each.structure.pack(each.state.curvature)[0] for each in (la, again))
    assert packed.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in packed.items())
    # Loaded rows lie in fewer parts, so their products are summed in another order.
    torch.testing.assert_close(again(NEW_BATCH), before, rtol=1e-10, atol=1e-13)
    evidence = la.log_marginal_likelihood()
    torch.testing.assert_close(again.log_marginal_likelihood(), evidence, rtol=1e-10, atol=0)
    assert again.arguments() == la.arguments()
    again.fit(loader(), override=False)
    assert again.n_data == 2 * la.n_data
    other = exact_posterior(cls, fit=False, **kwargs)
    other.load_state_dict(la.state_dict())
    torch.testing.assert_close(other(NEW_BATCH), before, rtol=1e-10, atol=1e-13)


def test_the_storage_is_chosen_anew_when_loading(tmp_path):
    la = exact_posterior(row_dtype="bfloat16", storage=tmp_path / "rows")
    la.save_pretrained(tmp_path / "saved", precision="exact")
    assert "rows" not in (tmp_path / "saved" / CONFIG).read_text().replace("row_dtype", "")
    again = FullLoraLaplace.from_pretrained(
        la.logits_model.model, tmp_path / "saved", storage="cpu"
    )
    assert again.storage == "cpu" and again.row_dtype == torch.bfloat16
    assert torch.equal(again(NEW_BATCH), la(NEW_BATCH))


@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("kind", ["shape", "missing", "extra", "format", "description"])
def test_forged_files_are_refused(cls, kwargs, kind, tmp_path):
    la = exact_posterior(cls, **kwargs)
    la.save_pretrained(tmp_path)
    name = "curvature.0"

    def change(tensors):
        if kind == "shape":
            tensors[name] = tensors[name][:-1]
        elif kind == "missing":
            del tensors[name]
        elif kind == "extra":
            tensors["curvature.99"] = torch.ones(2)
        elif kind == "format":
            tensors[name] = tensors[name].float()

    if kind == "description":
        size = json.loads((tmp_path / CONFIG).read_text())["curvature"]
        for value in (size + 1, -1, [size], "../x"):
            forge(tmp_path, curvature=value)
            with pytest.raises(ValueError, match="does not fit"):
                cls.from_pretrained(la.logits_model.model, tmp_path)
        return
    forge_tensors(tmp_path, change)
    with pytest.raises(ValueError, match="does not fit"):
        cls.from_pretrained(la.logits_model.model, tmp_path)
