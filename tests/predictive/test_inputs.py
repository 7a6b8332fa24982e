"""`predict` on texts in any container and on rows of a data set; inputs that are refused."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from laplace_lora import KronLoraLaplace
from laplace_lora.predictive.texts import encoded
from support.batches import LENGTHS, images, loader, rows, split_rows, token_batch
from support.generation import answers_posterior
from support.models import resnet
from support.posteriors import posterior
from support.references import assert_near
from support.texts import special_tokenizer, word_tokenizer

TEXTS = ["a b", "c", "d e f"]


class Series:
    """Stands for a pandas series: iterable, with `tolist`, and no sequence."""

    def __init__(self, texts):
        self.texts = texts

    def __iter__(self):
        return iter(self.texts)

    def tolist(self):
        return self.texts


class Indexed(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, n):
        return self.items[n]


@pytest.fixture(scope="module")
def la():
    return posterior(name="bert")


@pytest.mark.parametrize(
    "form", [tuple, np.array, lambda t: np.array(t, dtype=object), iter, Series, Indexed]
)
def test_texts_in_any_container(la, form):
    expected = torch.cat(
        [la(dict(word_tokenizer()([text], return_tensors="pt"))) for text in TEXTS]
    )
    assert_near(la.predict(form(TEXTS), word_tokenizer()).probs, expected)


def test_pairs_may_be_lists(la):
    pairs = [("a", "b"), ("c", "d e")]
    expected = la.predict(pairs, word_tokenizer()).probs
    assert_near(la.predict([list(pair) for pair in pairs], word_tokenizer()).probs, expected)
    assert_near(la.predict(np.array(pairs), word_tokenizer()).probs, expected)


def test_a_bare_string_is_one_text(la):
    one = la.predict("a b", word_tokenizer()).probs
    assert_near(one, la.predict(["a b"], word_tokenizer()).probs)


def test_tables_are_refused_and_their_columns_are_not(la):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": TEXTS, "id": range(3)})
    for call in (la.predict, la.acquire):
        args = (2, "entropy") if call == la.acquire else ()
        with pytest.raises(TypeError, match=r"a DataFrame is iterated by its columns.*\['text'\]"):
            call(table, *args, tokenizer=word_tokenizer())
    expected = la.predict(TEXTS, word_tokenizer()).probs
    assert_near(la.predict(table["text"], word_tokenizer()).probs, expected)


@pytest.mark.parametrize("data", [[1, 2], [None], iter([0.5])])
def test_items_that_are_no_inputs_are_refused(la, data):
    with pytest.raises(TypeError, match="predict takes texts, rows with 'input_ids' or batches"):
        la.predict(data, word_tokenizer())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (["a b", "c"], r"got list; texts go to la\.predict\(texts, tokenizer\)"),
        ("a b", r"got str; texts go to la\.predict"),
        ([{"input_ids": [3]}], "got list; texts, rows of a data set, pairs and loaders go to"),
        (None, "got NoneType"),
        ({"input_ids": [[3, 4]]}, "'input_ids' of the batch is a list, no tensor; tokenize with"),
        (word_tokenizer()(TEXTS, padding=True, return_tensors="np"), "is a ndarray, no tensor"),
    ],
)
def test_what_is_no_batch_is_refused_by_what_to_do(la, batch, message):
    for call in (la, la.logits_model, lambda x: la(x, pred_type="nn", link_approx="mc")):
        with pytest.raises(TypeError, match=message):
            call(batch)


def test_rows_of_a_data_set(la):
    data = loader().dataset
    expected = la(token_batch(LENGTHS))
    for form in (list, iter, Indexed):
        found = la.predict(form(data))
        assert_near(found.probs, expected)
        assert torch.equal(found.labels, token_batch(LENGTHS)["labels"])
    unequal = [
        {"input_ids": row["input_ids"][: int(row["attention_mask"].sum())].tolist()} for row in data
    ]
    assert_near(la.predict(unequal, word_tokenizer(), batch_size=2).probs, expected)
    with pytest.raises(ValueError, match="rows of different lengths need `tokenizer`"):
        la.predict(unequal)


def test_a_generator_of_batches(la):
    assert_near(la.predict(iter(list(loader()))).probs, la(token_batch(LENGTHS)))


MISSING = {
    "none": (["a b", None, "c", None], r"\[1, 3\].*such as None"),
    "first": ([float("nan"), "a b"], r"\[0\].*such as nan"),
    "array": (np.array(["a b", 2.5], dtype=object), r"\[1\].*such as 2.5"),
    "second": ([("a b", "c"), ("a", None)], r"\[1\].*such as \('a', None\)"),
    "first of a pair": ([(None, "a"), ("a b", "c")], r"\[0\].*such as \(None, 'a'\)"),
    "words": (["a b", ["a", "b", "c"]], r"\[1\].*such as \['a', 'b', 'c'\]"),
    "messages": (["a b", [{"role": "user", "content": "a"}]], r"\[1\].*apply_chat_template"),
    "many": (["a", *[None] * 9], r"\[1, 2, 3, 4, 5\]"),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_texts_are_named(la, name):
    data, message = MISSING[name]
    with pytest.raises(TypeError, match=rf"items {message}"):
        la.predict(data, word_tokenizer())


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "8", None])
def test_batches_have_at_least_one_example(la, batch_size):
    texts, tokenizer = ["a b", "c"], word_tokenizer()
    for call in (
        lambda: la.predict(texts, tokenizer, batch_size=batch_size),
        lambda: la.predict(split_rows(token_batch((4, 2))), tokenizer, batch_size=batch_size),
        lambda: la.acquire(texts, 1, "bald", tokenizer, batch_size=batch_size),
        lambda: la.acquire(texts, 1, "batchbald", tokenizer, batch_size=batch_size),
    ):
        with pytest.raises(ValueError, match="batch_size must be a whole number, at least 1; got"):
            call()


def test_texts_without_tokens_are_named(la):
    with pytest.raises(ValueError, match=r"rows \[0, 2\] have no tokens"):
        la.predict(["", "a", ""], word_tokenizer())


@pytest.mark.parametrize("name", ["bert", "llama-lm", "t5-lm"])
def test_a_row_without_its_batch_dimension_is_named(name):
    la, batch = posterior(name=name), token_batch((5, 3))
    row = {k: v[0] for k, v in batch.items() if k != "labels"}
    for call in (la, la.predict, la.logits_model, lambda x: la(x, method="sampled")):
        with pytest.raises(ValueError, match=r"shape \(5,\), without a batch dimension"):
            call(row)
        if call != la.predict:
            with pytest.raises(ValueError, match=r"shape \(5,\), without a batch dimension"):
                call(row["input_ids"])
    alone = {k: v.unsqueeze(0) for k, v in row.items()}
    assert_near(la.predict([row]).probs, la(alone))


@pytest.mark.parametrize(("batch", "named"), [({"text": ["a b"]}, "'text'"), ({}, "nothing")])
def test_a_batch_without_tensors_is_named(la, batch, named):
    with pytest.raises(TypeError, match=f"no tensors, but {named}; tokenize with padding=True"):
        la(batch)


def test_samples_are_the_same_at_every_call(la):
    batch, state = token_batch((4, 2)), torch.get_rng_state()
    first, second = (la.predict(batch, link_approx="mc", n_samples=9) for _ in range(2))
    assert torch.equal(first.probs, second.probs) and torch.equal(first.entropy, second.entropy)
    assert torch.equal(torch.get_rng_state(), state)
    other = la.predict(
        batch, link_approx="mc", n_samples=9, generator=torch.Generator().manual_seed(1)
    )
    assert not torch.equal(other.probs, first.probs)


def test_no_samples_are_refused(la):
    batch = token_batch((4, 2))
    for call in (la, la.predict):
        with pytest.raises(ValueError, match="n_samples of at least 1"):
            call(batch, link_approx="mc", n_samples=0)
    with pytest.raises(ValueError, match="n_samples must be a whole number, at least 1; got 0"):
        la(batch, pred_type="nn", link_approx="mc", n_samples=0)
    with pytest.raises(ValueError, match="n_samples must be a whole number"):
        la.calibrate(loader(), "mc", 0)


def test_inputs_that_are_not_finite_are_named():
    batch = images()
    data = DataLoader([rows(batch, n) for n in range(4)], batch_size=2)
    la = KronLoraLaplace(resnet(), "classification")
    la.fit(data)
    before = la(images())
    batch["pixel_values"][2, 0, 0, 0] = torch.nan
    calls = [
        lambda: la(batch),
        lambda: la(batch, pred_type="nn", link_approx="mc"),
        lambda: la.predict(batch),
        lambda: la(batch, method="sampled"),
        lambda: la.predict(batch, method="sampled"),
        lambda: la.optimize_prior_precision(method="gridsearch", val_loader=[batch]),
    ]
    for call in calls:
        with pytest.raises(FloatingPointError, match=r"not finite at rows \[2\] of the batch"):
            call()
    assert torch.equal(la(images()), before)
    fresh = KronLoraLaplace(resnet(), "classification")
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        fresh.fit(DataLoader([rows(batch, n) for n in range(4)], batch_size=4))


def test_questions_are_not_cut_at_their_end():
    la, tokenizer = answers_posterior(), word_tokenizer()
    long = "a b c d e f g h " * 3
    for call in (la.predict, lambda *args: la.acquire(args[0], 1, "batchbald", tokenizer=args[1])):
        with pytest.raises(ValueError, match=r"texts \[1\] have more tokens than .*=16"):
            call(["a b", long, long[:31]], tokenizer)
    tokenizer.truncation_side = "left"
    ids = torch.tensor([tokenizer(long)["input_ids"][-16:]])
    assert_near(la.predict([long], tokenizer).probs, la({"input_ids": ids}))


@pytest.mark.parametrize("limit", [16, 3])
def test_a_text_of_a_chat_template_begins_once(la, limit):
    tokenizer = special_tokenizer()
    tokenizer.model_max_length = limit
    rows = encoded(["h a b", "a b", ("h a", "b")], tokenizer)
    assert [row["input_ids"] for row in rows[:2]] == [[9, 2, 3]] * 2
    assert rows[2]["input_ids"] == tokenizer("h a", "b", truncation=True)["input_ids"]
    encoded(["h a b"], tokenizer, are_questions=True)  # of which nothing is cut
    with pytest.raises(ValueError, match=r"texts \[0\] have more tokens"):
        encoded(["h a b " + "c " * limit], tokenizer, are_questions=True)
    once = {"input_ids": torch.tensor([[9, 2, 3]])}
    assert_near(la.predict(["h a b"], tokenizer).probs, la(once))


@pytest.mark.parametrize("template", ["$A", "h $A g"])
def test_other_texts_are_as_the_tokenizer_has_them(template):
    tokenizer = special_tokenizer(template)
    (row,) = encoded(["h a"], tokenizer)
    assert row["input_ids"] == tokenizer("h a")["input_ids"]
