"""Functions of training examples and their Jacobians, whole and compressed."""

import math

import pytest
import torch

from laplace_lora.capture.jacobians import side_by_side
from laplace_lora.data.distributed import together
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.tuning.left_out.function_rows import FunctionRows
from support.batches import loader, token_batch
from support.posteriors import posterior

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)


@pytest.fixture(scope="module")
def la():
    return posterior(r=8)


def linear_model(la, numbers=math.inf, batch_size=5):
    data = loader(batch_size, lengths=LENGTHS)
    rows = FunctionRows(la.fitted, la.engine, CONTRASTS, numbers)
    with together(data) as team:
        for batch in data:
            rows.add(*la.fitted.split(batch))
        return rows, rows.linear_model(token_batch(LENGTHS)["labels"], team), team


def test_the_gram_matrix_is_that_of_all_jacobians(la):
    _, linear, _ = linear_model(la)
    la.model.eval()
    f, blocks = la.engine.jacobian_blocks(token_batch(LENGTHS), CONTRASTS.columns)
    J = side_by_side(blocks).flatten(0, 1)
    torch.testing.assert_close(linear.gram, J @ J.T)
    torch.testing.assert_close(linear.offset, CONTRASTS.mean(f).detach())


def test_a_modes_weights_give_its_functions(la):
    rows, linear, team = linear_model(la)
    mode = linear.mode(0.3)
    J = side_by_side(la.engine.jacobian_blocks(token_batch(LENGTHS), CONTRASTS.columns)[1])
    moved = linear.offset + J @ rows.weights(mode, team)
    torch.testing.assert_close(moved, mode.outputs)


def test_compressed_jacobians_keep_inner_products_the_better_the_longer(la):
    _, exact, _ = linear_model(la)
    size = sum(la.engine.sizes)
    errors = []
    for share in (0.9, 0.5, 0.1):
        rows, found, _ = linear_model(la, share * size)
        kept = sum(parts[0].shape[-1] for parts in rows.jacobians)
        assert kept <= share * size
        assert float(torch.linalg.eigvalsh(found.gram)[0]) > -1e-9
        errors.append(float((found.gram - exact.gram).norm() / exact.gram.norm()))
    assert 0 < errors[0] < errors[1] < errors[2] < 1
    assert errors[0] < 0.3


def test_compression_does_not_depend_on_the_batches(la):
    size = sum(la.engine.sizes)
    grams = [linear_model(la, size / 2, batch_size)[1].gram for batch_size in (1, 12)]
    torch.testing.assert_close(*grams)
