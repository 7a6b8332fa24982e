"""Files say how the prior was tuned, as long as it is the tuning's."""

import json

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.storage.files import CONFIG
from laplace_lora.tuning.left_out import leave_one_out
from support.forgery import forge
from support.language import text_loader
from support.models import peft_model
from support.posteriors import LOW, fitted, posterior


def saved(la, folder):
    """Save a posterior, load it, and return what was loaded."""
    la.save_pretrained(folder)
    return KronLoraLaplace.from_pretrained(la.logits_model, folder)


def assert_same(loaded, la):
    ours, theirs = vars(loaded.tuning).copy(), vars(la.tuning).copy()
    assert torch.equal(ours.pop("prior_precision"), theirs.pop("prior_precision"))
    assert ours == theirs
    assert str(loaded.tuning) == str(la.tuning)
    assert str(loaded) == str(la)


def test_leave_one_out_and_where_the_mean_was_moved(tmp_path, monkeypatch):
    def closer(linear, mode, *rest):
        return linear.mode(mode.precision / 2, mode)

    monkeypatch.setattr(leave_one_out, "closer_fit", closer)
    la = fitted(**LOW)
    assert la.tuning.leave_one_out.recentring is not None
    assert_same(saved(la, tmp_path), la)


def test_the_structure_that_the_evidence_chose(tmp_path):
    la = posterior(name="bert", **LOW)
    la.optimize_prior_precision(prior_structure="auto")
    assert la.tuning.structure is not None and la.tuning.reason
    assert_same(saved(la, tmp_path), la)


@pytest.mark.parametrize("structure", ["scalar", "auto"])
def test_the_width_of_a_language_model(tmp_path, structure):
    la = KronLoraLaplace(peft_model("llama-lm"), "language_modeling", **LOW)
    la.fit(text_loader())
    la.optimize_prior_precision(prior_structure=structure)
    assert la.tuning.widest is not None
    assert ("by log evidence" in str(la.tuning)) == (structure == "auto")
    assert_same(saved(la, tmp_path), la)


def test_a_prior_set_by_hand_was_not_tuned(tmp_path):
    la = fitted(**LOW)
    tuned, tuning = la.prior_precision, la.tuning
    assert "tuned by loo" in str(la)
    la.prior_precision = 2 * tuned
    assert la.tuning is None and "tuned by" not in str(la)
    assert saved(la, tmp_path).tuning is None
    la.prior_precision = tuned.expand(len(la.parts.names)).clone()  # the same prior, in pieces
    assert la.tuning is None
    la.prior_precision = tuned
    assert la.tuning is tuning


def test_files_of_earlier_and_later_versions(tmp_path):
    la = fitted(**LOW)
    la.save_pretrained(tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())["tuning"]
    later = {**record, "weather": "fine"}
    earlier = {**record, "leave_one_out": dict(record["leave_one_out"])}
    del earlier["leave_one_out"]["sharing"]
    for tuning in (later, earlier):
        forge(tmp_path, tuning=tuning)
        assert_same(KronLoraLaplace.from_pretrained(la.logits_model, tmp_path), la)
    forge(tmp_path, tuning=None)
    assert KronLoraLaplace.from_pretrained(la.logits_model, tmp_path).tuning is None


@pytest.mark.parametrize(
    "change",
    [
        {"method": 3},
        {"method": None},
        {"prior_precision": [1.0]},
        {"leave_one_out": []},
        {"leave_one_out": {}},
        {"widest": "wide"},
        {"structure": {"structure": "scalar", "evidences": {"scalar": "1"}}},
    ],
)
def test_forged_records_are_refused(change, tmp_path):
    la = fitted(**LOW)
    la.save_pretrained(tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())["tuning"]
    forge(tmp_path, tuning={**record, **change})
    if "prior_precision" in change:  # the tensor that the tuning chose is taken
        assert_same(KronLoraLaplace.from_pretrained(la.logits_model, tmp_path), la)
        return
    with pytest.raises(ValueError, match=next(iter(change))):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


def test_a_record_must_be_one(tmp_path):
    la = fitted(**LOW)
    la.save_pretrained(tmp_path)
    forge(tmp_path, tuning="loo")
    with pytest.raises(ValueError, match="tuning is 'loo'"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


def test_a_state_dictionary_says_so_too():
    la = fitted(**LOW)
    other = KronLoraLaplace(la.logits_model, "classification", **LOW)
    state = la.state_dict()
    other.load_state_dict(state)
    assert_same(other, la)
    del state["tuning"]  # that of an earlier version
    other.load_state_dict(state)
    assert other.tuning is None
    la.prior_precision = 2 * la.prior_precision
    other.load_state_dict(la.state_dict())
    assert other.tuning is None
