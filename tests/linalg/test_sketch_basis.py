"""Test matrices are the same wherever they are made, and are not kept for nothing."""

import weakref

import pytest
import torch

from laplace_lora.linalg import nystrom
from laplace_lora.linalg import sketch_basis as module
from laplace_lora.linalg.sketch import LowRankFactor
from laplace_lora.linalg.sketch_basis import sketch_basis
from support.peak import peak_of

CPU = torch.device("cpu")


@pytest.fixture
def without_room(monkeypatch):
    monkeypatch.setattr(module, "_SHARED", module._Shared(0))


def test_a_matrix_depends_on_its_size_alone(without_room):
    torch.manual_seed(1)
    first = sketch_basis(60, 26, torch.float64, CPU).clone()
    torch.manual_seed(2)
    second = sketch_basis(60, 26, torch.float64, CPU)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first.T @ first, torch.eye(26).double())


def test_sketches_share_a_large_matrix_until_they_are_decomposed(without_room):
    factors = [LowRankFactor.zeros(60, 8, torch.float32, "cpu") for _ in range(2)]
    for factor in factors:
        factor.update(torch.randn(5, 60))
    one, other = (factor._test_matrix() for factor in factors)
    assert one is other
    alive = weakref.ref(one)
    del one, other
    factors[0].decompose()
    assert alive() is not None
    factors[1].decompose()
    assert alive() is None


def test_small_matrices_are_kept_up_to_some_bytes(monkeypatch):
    size = sketch_basis(60, 26, torch.float64, CPU).nbytes
    monkeypatch.setattr(module, "_SHARED", module._Shared(2 * size + 1000))
    made = [weakref.ref(sketch_basis(d, 26, torch.float64, CPU)) for d in (60, 61)]
    assert all(matrix() is not None for matrix in made)
    sketch_basis(60, 26, torch.float64, CPU)  # the latest used
    sketch_basis(59, 26, torch.float64, CPU)
    assert [matrix() is None for matrix in made] == [False, True]


def test_a_large_matrix_is_made_in_pieces(monkeypatch):
    """To the rounding of double precision it is the one that is made at once."""
    whole = sketch_basis(5003, 27, torch.float64, CPU)
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "_SHARED", module._Shared(0))
    assert len(list(module._gaussian(5003, 27))) == 2
    torch.testing.assert_close(
        sketch_basis(5003, 27, torch.float64, CPU), whole, atol=1e-15, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_of_a_sketch_decompose_as_the_whole(dtype, monkeypatch):
    torch.manual_seed(0)
    factor = LowRankFactor.zeros(900, 20, dtype, "cpu")
    factor.update(torch.randn(40, 900) * 0.8 ** torch.arange(40.0).unsqueeze(1))
    whole = factor.decompose()
    monkeypatch.setattr(nystrom, "PIECE", 100)
    pieces = factor.decompose()
    torch.testing.assert_close(pieces.values, whole.values)
    torch.testing.assert_close(pieces.residual, whole.residual, rtol=1e-4, atol=1e-8)
    signs = (pieces.vectors * whole.vectors).sum(0).sign()
    torch.testing.assert_close(pieces.vectors * signs, whole.vectors, atol=1e-4, rtol=0)


def test_a_sketch_needs_twice_its_memory_and_its_eigenpairs(without_room):
    factor = LowRankFactor.zeros(20_000, 30, torch.float32, "cpu")

    def fit():
        factor.update(torch.randn(4, 20_000))
        return factor.decompose()

    assert peak_of(fit) < 2.5 * factor.sketch.nbytes  # beside the sketch itself


def test_a_sketch_in_float64_needs_no_copy_of_itself(without_room):
    factor = LowRankFactor.zeros(20_000, 30, torch.float64, "cpu", torch.float32)

    def fit():
        factor.update(torch.randn(4, 20_000))
        return factor.decompose()

    assert peak_of(fit) < factor.sketch.nbytes  # of which the test matrix is a half


def test_sums_in_float64_keep_what_single_precision_rounds():
    torch.manual_seed(0)
    rows = torch.randn(40, 900) / 30 * 0.6 ** torch.arange(40.0).unsqueeze(1)
    factor = LowRankFactor.zeros(900, 30, torch.float64, "cpu", torch.float32)
    for part in rows.split(7):
        factor.update(part)
    eigen = factor.decompose("zero")
    wide = rows.double()
    expected = torch.linalg.eigvalsh(wide @ wide.T).flip(0)[:20]
    assert float(expected[-1]) < 0.1 * torch.finfo(torch.float32).eps * float(expected[0])
    torch.testing.assert_close(eigen.values[:20], expected, rtol=1e-3, atol=0)
    gram = eigen.vectors[:, :20].T @ eigen.vectors[:, :20]
    assert eigen.vectors.dtype == torch.float32
    torch.testing.assert_close(gram, torch.eye(20), atol=1e-5, rtol=0)
