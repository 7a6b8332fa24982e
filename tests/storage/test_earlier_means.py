"""Factors that earlier versions saved of weights stored as ``(in, out)`` go on with more data."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from laplace_lora.curvature.kfac import KfacSums
from laplace_lora.posteriors import state_dicts
from laplace_lora.storage import archive
from support.batches import loader, token_batch
from support.models import excite, peft_model
from support.posteriors import DENSE, LOW
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)
DATA = loader().dataset
CORRECTED = {**DENSE, "eigenvalue_correction": True}


def part(some):
    return DataLoader(some, batch_size=2)


@pytest.fixture
def earlier(monkeypatch):
    """Fit and save as before: the first factor of such weights was the mean, and nothing said so.

    Returns:
        What ends this.
    """

    def kfacs(self, blocks, transposed, n):
        pairs = self.covariances(n)
        orders = [pairs[b.map][:: 1 if transposed[b.map] else -1] for b in blocks]
        return [
            [pairs[b.map][1]] if b.is_bias else list(order)
            for b, order in zip(blocks, orders, strict=True)
        ]

    monkeypatch.setattr(KfacSums, "kfacs", kfacs)
    for module in (archive, state_dicts):
        monkeypatch.setattr(module, "SECOND", None)
    return monkeypatch.undo


@pytest.mark.parametrize("way", ["exact", "half", "state_dict"])
@pytest.mark.parametrize("kwargs", [DENSE, LOW, CORRECTED])
def test_more_data_are_added_to_what_an_earlier_version_saved(kwargs, way, earlier, tmp_path):
    net = excite(peft_model("gpt2", modules_to_save=["c_fc", "score"]))
    old, whole, new = (KronLoraLaplace(net, "classification", **kwargs) for _ in range(3))
    old.fit(part(DATA[:3]))
    said = old(BATCH)
    entries = old.state_dict()
    if way != "state_dict":
        old.save_pretrained(tmp_path, precision=way)
    earlier()
    if way == "state_dict":
        new.load_state_dict(entries)
    else:
        new = KronLoraLaplace.from_pretrained(net, tmp_path)
    tolerance = 1e-2 if way == "half" else 1e-9
    assert_near(new(BATCH), said, tolerance)
    new.save_pretrained(tmp_path / "again", precision="exact")
    assert_near(KronLoraLaplace.from_pretrained(net, tmp_path / "again")(BATCH), new(BATCH), 1e-9)
    new.fit(part(DATA[3:]), override=False)
    whole.fit(part(DATA[:3]))
    whole.fit(part(DATA[3:]), override=False)
    assert_near(new.log_marginal_likelihood(), whole.log_marginal_likelihood(), tolerance)
    assert_near(new(BATCH), whole(BATCH), tolerance)


def test_what_is_saved_now_comes_back_unchanged(tmp_path):
    net = excite(peft_model("gpt2", modules_to_save=["c_fc", "score"]))
    la, again = (KronLoraLaplace(net, "classification", **DENSE) for _ in range(2))
    la.fit(part(DATA))
    la.save_pretrained(tmp_path, precision="exact")
    again.load_state_dict(la.state_dict())
    for other in (again, KronLoraLaplace.from_pretrained(net, tmp_path)):
        for block, expected in zip(other.H_facs.kfacs, la.H_facs.kfacs, strict=True):
            for x, y in zip(block, expected, strict=True):
                assert torch.equal(x.matrix, y.matrix)
