"""Posteriors that earlier versions saved are restored, with the answers they gave then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import laplace_lora
from support.models import peft_model

FOLDER = Path(__file__).parent / "saved_by_0_1"
SAVED = sorted(path.parent for path in FOLDER.glob("*/expected.json"))


def restored(folder):
    """Return the posterior in a folder, around its model, and what it said when it was saved."""
    expected = json.loads((folder / "expected.json").read_text())
    model = peft_model(**expected["model"])
    # The weights are kept in few bits, which hold them exactly; loading widens them.
    model.load_state_dict(load_file(folder / "model.safetensors"))
    cls = getattr(laplace_lora, expected["class"])
    return cls.from_pretrained(model, folder), expected


def check(found, expected):
    """Compare by norm: an entry that cancels to zero has no digits of its own."""
    expected = torch.tensor(expected, dtype=torch.float64)
    assert found.dtype == torch.float64 and found.shape == expected.shape
    assert (found - expected).norm() <= 1e-9 * expected.norm()


def test_every_structure_is_there():
    assert len(SAVED) == 8


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_evidence_and_predictions_are_as_they_were(folder):
    la, expected = restored(folder)
    assert type(la).__name__ == expected["class"] and la.n_data == expected["n_data"]
    check(la.log_marginal_likelihood(), expected["log_marginal_likelihood"])
    check(la.prior_precision, expected["prior_precision"])
    assert float(la.sigma_noise) == pytest.approx(expected["sigma_noise"], rel=1e-9)
    batch = {key: torch.tensor(value) for key, value in expected["batch"].items()}
    link = {"link_approx": "probit"}  # their default
    if la.likelihood == "regression":
        found = dict(zip(("mean", "covariance"), la(batch), strict=True))
    elif la.likelihood == "reward_modeling":
        difference, variance = la.reward_difference(batch)
        found = {"probs": la(batch, **link), "difference": difference, "variance": variance}
    else:
        whole = la.predict(batch, n_samples=2, progress_bar=False)
        found = {"probs": la(batch, **link), "mean": whole.mean, "covariance": whole.covariance}
    assert found.keys() == expected["predictions"].keys()
    for name, value in found.items():
        check(value, expected["predictions"][name])
