"""How long a fit takes is what the clock says of its middle batches."""

import pytest
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.commands import timing
from laplace_lora.commands.timing import BATCHES, FitTime, Watched, fit_time, tuning_time
from support.command_line import run
from support.models import peft_model
from support.on_disk import reviews, tokenizer


def loader(count, batch_size):
    words = tokenizer()
    rows = [{**words(r["text"]), "labels": r["label"]} for r in reviews(count, 0)]
    return DataLoader(rows, batch_size, collate_fn=DataCollatorWithPadding(words))


@pytest.fixture
def clock(monkeypatch):
    """Set the times that the clock says one after the other; the warm-up must not look at it."""
    fits, fit = [], DiagLoraLaplace.fit

    def counted(self, *args, **kwargs):
        fits.append(args)
        return fit(self, *args, **kwargs)

    def set_to(*times):
        given = iter(times)

        def perf_counter():
            assert len(fits) in (1, 2)
            return next(given)

        fits.clear()
        monkeypatch.setattr(timing, "perf_counter", perf_counter)
        return given

    monkeypatch.setattr(DiagLoraLaplace, "fit", counted)
    return set_to


def estimated(data, batch_size):
    la = DiagLoraLaplace(peft_model("bert", num_labels=2), "classification")
    return fit_time(la, data, batch_size)


def test_the_first_batch_and_the_end_count_once(clock):
    # Read at 1 s, verified until 11 s; then 1 s a batch of 4, of which the last is read at 19 s.
    left = clock(0.0, 1.0, *(11.0 + i for i in range(9)), 25.0)
    assert estimated(loader(400, 4), 4) == FitTime(17.0 + 0.25 * 392, 1.0)
    assert next(left, None) is None
    # The last batch of two rows is no measure of the others.
    clock(0.0, 1.0, *(11.0 + i for i in range(9)), 25.0)
    assert estimated(loader(398, 4), 4) == FitTime(17.0 + 0.25 * 392, 1.0)


@pytest.mark.parametrize(("rows", "batches"), [(3, 1), (8, 2), (12, 3), (38, 10)])
def test_a_fit_that_was_timed_as_a_whole_takes_just_that(clock, rows, batches):
    clock(1.0, *(5.0 + 2.0 * i for i in range(batches)), 50.0)
    assert estimated(loader(rows, 4), 4).total == pytest.approx(49.0)


def test_slow_batches_are_few(clock):
    left = clock(0.0, 1.0, 15.0, 22.0, 29.0, 40.0)  # the fourth is not begun
    time = estimated(loader(400, 4), 4)
    assert time == FitTime(40.0 - 7.0 + 7.0 / 4 * 392, 7.0) and next(left, None) is None


def test_batches_are_those_of_the_fit_from_all_parts_of_the_data():
    data = loader(90, 4)
    every = [batch["labels"].tolist() for batch in data]
    watched = Watched(data, 4)
    some = [batch["labels"].tolist() for batch in watched]
    at = [i * 22 // 9 for i in range(BATCHES)]
    assert some == [every[i] for i in at] and at[0] == 0 and at[-1] == len(every) - 1
    assert watched.rows == [len(rows) for rows in some] and len(watched.times) == BATCHES
    assert [batch["labels"].tolist() for batch in Watched(loader(16, 4), 4)] == every[:4]


def test_doctor_says_it(made, data, monkeypatch):
    monkeypatch.setattr(
        "laplace_lora.commands.examination.fit_time", lambda la, data, size: FitTime(125.4, 0.375)
    )
    text = run("doctor", made("classifier"), "--data", data("train")).stdout
    assert "A fit of 48 rows in 6 batches takes about 125 s (0.38 s a batch). Tuning" in text
    assert "up to five passes over all rows" in text


def test_what_tuning_adds_is_that_of_its_default():
    for likelihood, outputs, says in (
        ("classification", 3, "a backward pass for each class"),
        ("reward_modeling", 1, "a backward pass for each class"),
        ("regression", 1, "as long again or longer"),
    ):
        la = KronLoraLaplace(peft_model("bert", num_labels=outputs), likelihood)
        assert says in tuning_time(la)
    texts = KronLoraLaplace(peft_model("llama-lm"), "language_modeling")
    assert "64 of the texts" in tuning_time(texts)
