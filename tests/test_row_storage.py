"""Where the rows of FullLoraLaplace lie: storages, formats, files, memory, saving, resuming."""

import gc
import json

import pytest
import torch
from test_checkpoint import forge, forge_tensors
from test_data_space import BATCH, BOTH, ENOUGH, posterior
from test_interrupted_fit import Interrupted, Interruption
from test_posterior import LENGTHS, loader
from torch.utils.data import DataLoader

from laplace_lora import FullLoraLaplace, LowRankLoraLaplace
from laplace_lora.linalg import row_storage
from laplace_lora.linalg.row_storage import RowStorage
from laplace_lora.posteriors import exact as data_space
from laplace_lora.storage.files import CONFIG
from laplace_lora.structures import sizes as memory
from tiny import assert_near


@pytest.mark.parametrize("storage", ["cpu", "disk", "folder"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_every_storage_gives_the_same(storage, dtype, tmp_path, monkeypatch):
    storage = tmp_path / "rows" if storage == "folder" else storage
    reference = posterior(row_dtype=dtype)
    monkeypatch.setattr(row_storage, "PIECE", 100)  # many pieces
    la = posterior(storage=storage, row_dtype=dtype)
    assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood(), 1e-12)
    assert_near(la(BATCH), reference(BATCH), 1e-12)
    assert_near(la.weight_variance(), reference.weight_variance(), 1e-12)
    la.fit(loader(), override=False)
    assert len(la.rows) == 2 * len(reference.rows)
    assert {t.dtype for t in la.rows.tensors()} == {getattr(torch, dtype)}
    prior = torch.linspace(1, 2, la.n_layers)
    reference.fit(loader(), override=False)
    for one in (la, reference):
        one.prior_precision = prior
    assert_near(la(BATCH), reference(BATCH), 1e-12)


def test_row_formats_round_the_rows_alone():
    exact = posterior()
    _, covariance = exact._glm_predictive_distribution(BATCH)
    errors = []
    for dtype in (torch.float32, "bfloat16"):
        la = posterior(row_dtype=dtype)
        rounded = la._glm_predictive_distribution(BATCH)[1]
        assert rounded.dtype == torch.float64
        errors.append(((rounded - covariance).norm() / covariance.norm()).item())
        assert la.rows.nbytes == len(la.rows) * la.n_params * la.row_dtype.itemsize
    assert 0 < errors[0] < 1e-6 < errors[1] < 0.02


def test_single_precision_agrees_with_double():
    exact = posterior(prior_precision=0.2)
    for cls, kwargs in BOTH:
        la = posterior(cls, dtype=torch.float32, prior_precision=0.2, **kwargs)
        assert la.rows.dtype == torch.float32 and la(BATCH).dtype == torch.float32
        assert_near(la(BATCH).double(), exact(BATCH), 1e-4)
        assert_near(la.log_marginal_likelihood(), exact.log_marginal_likelihood(), 1e-3)


def test_files_go_with_the_posterior(tmp_path):
    la = posterior(storage=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    la.fit(loader())  # the earlier rows are deleted
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="labels"):
        la.fit(DataLoader([{**e, "labels": torch.tensor(9)} for e in loader().dataset]))
    la(BATCH)
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    del la
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_fit_are_refused():
    rows = RowStorage([2, 3], torch.float32, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="tensor 1 has 3 numbers"):
        rows.append(1, torch.ones(4, 2))
    with pytest.raises(ValueError, match="equally many rows"):
        rows.replace([torch.ones(4, 2), torch.ones(5, 3)])


def test_unknown_options_are_refused():
    for options, message in (
        ({"storage": "gpu"}, "storage must be one of"),
        ({"row_dtype": "float16"}, "row_dtype must be one of"),
        ({"row_dtype": "float64", "dtype": torch.float32}, "wider than the rows"),
    ):
        with pytest.raises(ValueError, match=message):
            posterior(fit=False, **options)
    with pytest.raises(ValueError, match="rank must be positive"):
        posterior(LowRankLoraLaplace, fit=False, rank=0)


# --- Memory ---------------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_before_the_work(tmp_path, monkeypatch):
    la = posterior()
    before = la(BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda device: 10_000)
        with pytest.raises(MemoryError, match=r"14 rows of 307 numbers .* use LowRankLoraLaplace"):
            la.fit(loader())
        with pytest.raises(MemoryError, match="28 rows"):
            la.merge([la])
    assert torch.equal(la(BATCH), before)
    with monkeypatch.context() as patch:
        patch.setattr(data_space, "free_space", lambda storage: 10_000)
        with pytest.raises(MemoryError, match="the disk of storage="):
            posterior(storage=tmp_path)
    assert row_storage.free_space(tmp_path / "not" / "there") > 10_000


def test_memory_is_estimated_before_the_fit(monkeypatch):
    la = posterior(fit=False)
    with pytest.raises(ValueError, match="n_examples"):
        la.estimate_memory(BATCH)
    with pytest.raises(AttributeError, match="not fitted"):
        la.curvature_size()
    estimate = la.estimate_memory(BATCH, n_examples=len(LENGTHS))
    la.fit(loader())
    la(BATCH)
    held = la.rows.nbytes + sum(t.nbytes for t in la._eigen)
    assert la.rows.nbytes == 14 * la.n_params * 8 < held < estimate.curvature < 1.5 * held
    assert la.curvature_size() == 14 * (la.n_params + 28)
    assert la.estimate_memory(BATCH).curvature == estimate.curvature
    disk = posterior(fit=False, storage="disk").estimate_memory(BATCH, n_examples=7)
    assert disk.curvature == estimate.curvature - la.rows.nbytes
    low = posterior(LowRankLoraLaplace, **ENOUGH)
    held = low.sketch.nbytes + low.rows.nbytes
    assert held < low.estimate_memory(BATCH).curvature < 2 * held
    monkeypatch.setattr(memory, "available", lambda device: 10)
    assert "use LowRankLoraLaplace" in str(la.estimate_memory(BATCH))
    assert "lower `rank`" in str(low.estimate_memory(BATCH))


# --- Keeping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_a_posterior_comes_back_bit_for_bit(cls, kwargs, tmp_path):
    la = posterior(cls, **kwargs)
    la.optimize_prior_precision(prior_structure="matrix")
    la.calibrate(loader())
    before = la(BATCH)
    la.save_pretrained(tmp_path)
    again = cls.from_pretrained(la.logits_model.model, tmp_path)
    assert torch.equal(again(BATCH), before)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert again.arguments() == la.arguments()
    again.fit(loader(), override=False)
    assert again.n_data == 2 * la.n_data
    other = posterior(cls, fit=False, **kwargs)
    other.load_state_dict(la.state_dict())
    assert torch.equal(other(BATCH), before)


def test_the_storage_is_chosen_anew_when_loading(tmp_path):
    la = posterior(row_dtype="bfloat16", storage=tmp_path / "rows")
    la.save_pretrained(tmp_path / "saved")
    assert "rows" not in (tmp_path / "saved" / CONFIG).read_text().replace("row_dtype", "")
    again = FullLoraLaplace.from_pretrained(
        la.logits_model.model, tmp_path / "saved", storage="cpu"
    )
    assert again.storage == "cpu" and again.row_dtype == torch.bfloat16
    assert torch.equal(again(BATCH), la(BATCH))


@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("kind", ["shape", "missing", "extra", "format", "description"])
def test_forged_files_are_refused(cls, kwargs, kind, tmp_path):
    la = posterior(cls, **kwargs)
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


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("cls,kwargs", [*BOTH, (FullLoraLaplace, {"storage": "disk"})])
def test_an_interrupted_fit_goes_on(cls, kwargs, after, tmp_path):
    data = loader(2)
    straight = posterior(cls, fit=False, **kwargs)
    straight.fit(data)
    options = {"checkpoint_dir": tmp_path / "fit", "checkpoint_every": 1}
    with pytest.raises(Interruption):
        posterior(cls, fit=False, **kwargs).fit(Interrupted(data, after), **options)
    again = posterior(cls, fit=False, **kwargs)
    again.fit(data, **options)
    assert torch.equal(again(BATCH), straight(BATCH))
    assert again.n_data == straight.n_data and not list((tmp_path / "fit").iterdir())


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_a_failed_fit_leaves_the_earlier_posterior(cls, kwargs):
    la = posterior(cls, **kwargs)
    before = la(BATCH)
    original = la.backend.root_blocks
    calls = []

    def broken(x, y):
        loss, blocks = original(x, y)
        calls.append(1)
        scale = torch.inf if len(calls) == 2 else 1.0
        return loss, (block * scale for block in blocks)

    la.backend.root_blocks = broken
    with pytest.raises(FloatingPointError, match=r"batch 1 .*lora_A.*not finite"):
        la.fit(loader())
    del la.backend.root_blocks
    assert torch.equal(la(BATCH), before) and la.n_data == len(LENGTHS)


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_moving_to_a_device_moves_everything(cls, kwargs):
    la = posterior(cls, **kwargs)
    before = la(BATCH)
    assert la.to("cpu") is la
    assert_near(la(BATCH), before)
    la.to("meta")
    tensors = [value for value in vars(la).values() if isinstance(value, torch.Tensor)]
    tensors += [*la.model.parameters(), *la.rows.tensors()]
    tensors += la.curvature.tensors()
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert la.rows.device.type == "meta"
