"""Taking a batch apart, whatever it holds beside rows of examples."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from laplace_lora.data.batches import batch_length, first_examples, has_labels, some_examples
from laplace_lora.data.pairs import as_pairs
from laplace_lora.evaluation import MAP, evaluate
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import posterior
from support.preferences import pair_batch
from support.references import assert_near

IDS = torch.tensor([[1, 2]])
SCALARS = {"tensor": torch.tensor(4), "array": np.array(4), "number": 4}


@pytest.mark.parametrize("kind", SCALARS)
def test_a_scalar_stays_as_it_is(kind):
    batch = {"num_items_in_batch": SCALARS[kind], **token_batch((3, 6, 4))}
    for taken in (first_examples(batch, 2), some_examples(batch, [2, 0])):
        assert taken["num_items_in_batch"] is SCALARS[kind]
        assert len(taken["input_ids"]) == len(taken["labels"]) == 2


def test_texts_are_counted_before_what_has_rows_of_its_own():
    assert batch_length({"pixel_values": torch.zeros(128, 6), **token_batch((3, 6))}) == 2


def test_a_mapping_in_a_batch_gives_rows_too():
    """With as many keys as there are examples, it has their number of entries."""
    table = {"height": torch.arange(3), "width": [5, 6, 7], "unit": "px"}
    batch = {"sizes": table, **token_batch((3, 6, 4))}
    assert first_examples(batch, 2)["sizes"]["height"].tolist() == [0, 1]
    taken = some_examples(batch, [2, 0])["sizes"]
    assert taken["height"].tolist() == [2, 0]
    assert taken["width"] == [7, 5] and taken["unit"] == "px"


def test_a_fit_takes_scalars():
    """A Trainer's collator may count the batch's tokens."""

    class Counting:
        dataset = loader().dataset

        def __iter__(self):
            return ({**batch, "num_items_in_batch": torch.tensor(4)} for batch in loader())

    evidence = []
    for data in (loader(), Counting()):
        la = KronLoraLaplace(peft_model("bert"), "classification")
        la.fit(data)
        evidence.append(la.log_marginal_likelihood())
    assert_near(evidence[1], evidence[0])


def test_pairs_take_scalars():
    batch = {"total_chosen": torch.tensor(4), "total_rejected": torch.tensor(4), **pair_batch()}
    batch.pop("labels", None)
    assert len(as_pairs(batch)["labels"]) == len(pair_batch()["input_ids_chosen"])


@pytest.mark.parametrize("labels", [["good", "bad"], None])
def test_labels_that_are_no_numbers_are_named(labels):
    la = posterior(name="bert", fit=False)
    batch = {**token_batch((3, 4)), "labels": labels}
    with pytest.raises(TypeError, match=r"labels must be numbers, .* got (\['good'|None)"):
        la.fit(DataLoader([batch], batch_size=None))
    with pytest.raises(TypeError, match="labels must be numbers"):
        evaluate(MAP(la.logits_model), [batch])
    la.fit(loader())
    if labels is None:
        assert la.predict([batch], progress_bar=False).labels is None
    else:
        with pytest.raises(TypeError, match="labels must be numbers"):
            la.predict([batch], progress_bar=False)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": IDS, "labels": IDS}, True),
        ({"input_ids": IDS, "labels": None}, False),
        ({"input_ids": IDS}, False),
        ((IDS, IDS), True),
        (({"input_ids": IDS}, None), False),
        ([IDS], False),
        (IDS, False),
    ],
)
def test_none_in_the_place_of_labels_are_none(batch, expected):
    assert has_labels(batch, "labels") is expected
