"""Files and state dictionaries say what a calibration takes back when it is undone."""

import json

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.storage.files import CONFIG
from support.batches import loader, token_batch, validation
from support.forgery import forge, forge_tensors
from support.posteriors import LOW, posterior

BATCH = token_batch((4, 2, 5), seed=3)
PRIOR, SCALE = "uncalibrated.prior_precision", "uncalibrated.covariance_scale"


def by_file(la, folder, precision="half"):
    la.save_pretrained(folder, precision)
    return KronLoraLaplace.from_pretrained(la.logits_model, folder)


def by_exact_file(la, folder):
    return by_file(la, folder, "exact")


def by_dictionary(la, folder):
    again = KronLoraLaplace(la.logits_model, "classification", **LOW)
    again.load_state_dict(la.state_dict())
    return again


WAYS = [by_file, by_exact_file, by_dictionary]


def calibrated():
    la = posterior(name="bert", **LOW)
    la.prior_precision = torch.arange(la.n_layers) + 2.0
    before = la.prior_precision.clone()
    la.calibrate(validation())
    return la, before


@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_calibration_is_undone_as_a_whole(way, tmp_path):
    la, before = calibrated()
    again = way(la, tmp_path)
    assert torch.equal(again.prior_precision, la.prior_precision)
    again = way(again, tmp_path)  # and is remembered the second time
    again.fit(loader())
    assert torch.equal(again.prior_precision, before)
    assert again.covariance_scale == again.likelihood_temperature == 1
    assert "uncalibrated" not in str(again.state_dict().keys())


@pytest.mark.parametrize("way", WAYS)
def test_what_was_set_before_or_after_saving_stays(way, tmp_path):
    la, before = calibrated()
    la.prior_precision = 3 * before
    again = way(la, tmp_path)
    again.likelihood_temperature = 1.5
    again.fit(loader())
    assert torch.equal(again.prior_precision, 3 * before)
    assert again.covariance_scale == 1 and again.likelihood_temperature == 1.5


@pytest.mark.parametrize("way", ["file", "dictionary"])
def test_what_earlier_versions_calibrated_stays_as_a_whole(way, tmp_path):
    la, _ = calibrated()
    if way == "file":
        la.save_pretrained(tmp_path)
        config = json.loads((tmp_path / CONFIG).read_text())
        scalars = {k: v for k, v in config["scalars"].items() if "uncalibrated" not in k}
        further = [name for name in config["further_tensors"] if "uncalibrated" not in name]

        def change(tensors):
            for name in [name for name in tensors if "uncalibrated" in name]:
                del tensors[name]

        forge(tmp_path, scalars=scalars, further_tensors=further)
        forge_tensors(tmp_path, change)
        again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    else:
        again = KronLoraLaplace(la.logits_model, "classification", **LOW)
        state = {k: v for k, v in la.state_dict().items() if "uncalibrated" not in k}
        again.load_state_dict(state)
    again.fit(loader())
    assert torch.equal(again.prior_precision, la.prior_precision)
    assert torch.equal(again(BATCH), la(BATCH))


@pytest.mark.parametrize("value", [-1.0, "1", None, [2.0]])
def test_forged_numbers_are_refused(value, tmp_path):
    la, _ = calibrated()
    la.save_pretrained(tmp_path)
    scalars = json.loads((tmp_path / CONFIG).read_text())["scalars"]
    forge(tmp_path, scalars={**scalars, SCALE: value})
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    with pytest.raises(ValueError, match="covariance_scale must be"):
        la.load_state_dict({**la.state_dict(), SCALE: value})


def test_a_missing_number_is_named(tmp_path):
    la, _ = calibrated()
    la.save_pretrained(tmp_path)
    scalars = json.loads((tmp_path / CONFIG).read_text())["scalars"]
    del scalars[SCALE]
    forge(tmp_path, scalars=scalars)
    with pytest.raises(ValueError, match=f"'{SCALE}' is missing"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


FORGED = [(-torch.ones(1), "must be positive"), (torch.ones(3), "do not fit")]


@pytest.mark.parametrize("value,message", FORGED)
def test_forged_tensors_are_refused(value, message, tmp_path):
    la, _ = calibrated()
    la.save_pretrained(tmp_path)
    forge_tensors(tmp_path, lambda tensors: tensors.update({PRIOR: value.double()}))
    with pytest.raises(ValueError, match=message):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    with pytest.raises(ValueError, match=message):
        la.load_state_dict({**la.state_dict(), PRIOR: value})
