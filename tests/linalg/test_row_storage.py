"""Where the rows of the exact posterior lie: in memory or on disk, in which dtype."""

import gc

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora.linalg import row_storage
from laplace_lora.linalg.row_storage import RowStorage, by_tensor, by_weight
from support.batches import loader
from support.exact_posteriors import NEW_BATCH, exact_posterior
from support.references import assert_near


@pytest.mark.parametrize("storage", ["cpu", "disk", "folder"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_every_storage_gives_the_same(storage, dtype, tmp_path, monkeypatch):
    storage = tmp_path / "rows" if storage == "folder" else storage
    reference = exact_posterior(row_dtype=dtype)
    monkeypatch.setattr(row_storage, "PIECE", 100)  # many pieces
    la = exact_posterior(storage=storage, row_dtype=dtype)
    assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood(), 1e-12)
    assert_near(la(NEW_BATCH), reference(NEW_BATCH), 1e-12)
    assert_near(la.weight_variance(), reference.weight_variance(), 1e-12)
    la.fit(loader(), override=False)
    assert len(la.rows) == 2 * len(reference.rows)
    assert {t.dtype for t in la.rows.tensors()} == {getattr(torch, dtype)}
    prior = torch.linspace(1, 2, la.n_layers)
    reference.fit(loader(), override=False)
    for one in (la, reference):
        one.prior_precision = prior
    assert_near(la(NEW_BATCH), reference(NEW_BATCH), 1e-12)


def test_row_formats_round_the_rows_alone():
    exact = exact_posterior()
    _, covariance = exact._glm_predictive_distribution(NEW_BATCH)
    errors = []
    for dtype in (torch.float32, "bfloat16"):
        la = exact_posterior(row_dtype=dtype)
        rounded = la._glm_predictive_distribution(NEW_BATCH)[1]
        assert rounded.dtype == torch.float64
        errors.append(((rounded - covariance).norm() / covariance.norm()).item())
        assert la.rows.nbytes == len(la.rows) * la.n_params * la.row_dtype.itemsize
    assert 0 < errors[0] < 1e-6 < errors[1] < 0.02


def test_files_go_with_the_posterior(tmp_path):
    la = exact_posterior(storage=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    la.fit(loader())  # the earlier rows are deleted
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="labels"):
        la.fit(DataLoader([{**e, "labels": torch.tensor(9)} for e in loader().dataset]))
    la(NEW_BATCH)
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    del la
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_fit_are_refused():
    rows = RowStorage([2, 3], torch.float32, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="tensor 1 have 3 entries"):
        rows.append(1, torch.ones(4, 2))
    with pytest.raises(ValueError, match="equally many rows"):
        rows.replace([torch.ones(4, 2), torch.ones(5, 3)])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2.0], [2.0] * 5), ([2.0, 3.0], [2.0] * 3 + [3.0] * 2), ([1.0, 2.0, 3.0, 4.0, 5.0], None)],
)
def test_values_belong_to_all_to_tensors_or_to_weights(values, expected):
    values, sizes = torch.tensor(values), [3, 2]
    found = by_weight(by_tensor(values, sizes), sizes)
    assert torch.equal(found, values if expected is None else torch.tensor(expected))
    with pytest.raises(ValueError, match="3 values for 2 tensors of 5 numbers"):
        by_tensor(torch.ones(3), sizes)
