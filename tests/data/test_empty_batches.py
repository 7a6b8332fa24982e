"""Batches without examples, as filtered streams have them, count for nothing."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora.evaluation import MAP, evaluate
from support.batches import LENGTHS, rows, token_batch
from support.posteriors import posterior
from support.preferences import pair_batch, reward_posterior
from support.references import assert_near

BATCH = token_batch(LENGTHS)
WHOLE = [rows(BATCH, slice(i, i + 4)) for i in (0, 4)]
NONE = rows(BATCH, slice(0, 0))


def batches(items):
    return DataLoader(items, batch_size=None)


@pytest.fixture(scope="module")
def la():
    return posterior(name="bert")


@pytest.mark.parametrize("items", [[*WHOLE, NONE], [NONE, WHOLE[0], NONE, WHOLE[1]]])
def test_empty_batches_change_nothing(la, items):
    other = posterior(name="bert", fit=False)
    other.fit(batches(items))
    assert other.n_data == la.n_data == 7
    assert_near(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    pairs = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in items]
    for data in (items, pairs):
        assert_near(la.predict(data, progress_bar=False).probs, la(BATCH))
    report = evaluate(MAP(la.logits_model), items, bootstrap=2)
    assert len(report.labels) == 7


def test_a_loader_of_empty_batches_is_empty(la):
    for items in ([], [NONE]):
        with pytest.raises(ValueError, match="the data are empty"):
            la.predict(items, progress_bar=False)
        with pytest.raises(ValueError, match="loader is empty"):
            la.fit(batches(items))


def test_empty_pairs_are_left_out():
    la, pairs = reward_posterior(), pair_batch()
    none = {key: value[:0] for key, value in pairs.items()}
    found = la.predict([none, pairs, none], progress_bar=False)
    assert_near(found.probs, la(pairs))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_a_single_batch_with_nothing_to_read_is_refused(la, shape):
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    with pytest.raises(ValueError, match="there is nothing that the model could read"):
        la(batch)
    with pytest.raises(ValueError, match="there is nothing that the model could read"):
        la.predict(batch)
