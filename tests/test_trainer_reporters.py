"""What LaplaceCallback logs reaches reporters that close their runs when training ends."""

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import MLflowCallback

from laplace_lora import LaplaceCallback
from laplace_lora.trainer_reporters import reporters_behind
from support.batches import rows, token_batch
from support.models import peft_model
from support.trainers import quiet


class Reporter(TrainerCallback):
    """As MLflow's: metrics after the end of a run begin another, which nobody ends."""

    __module__ = MLflowCallback.__module__

    def __init__(self):
        self.runs, self.is_open, self.begun = [], False, 0

    def on_train_begin(self, *args, **kwargs):
        self.begun += 1

    def on_log(self, *args, logs, **kwargs):
        if not self.is_open:
            self.runs, self.is_open = [*self.runs, []], True
        self.runs[-1] += logs

    def on_train_end(self, *args, **kwargs):
        self.is_open = False


class Own(TrainerCallback):
    """A user's, which may change weights when training ends."""

    def __init__(self, order, begun):
        self.order, self.begun = order, begun

    def on_train_begin(self, *args, **kwargs):
        self.begun.append(self)

    def on_train_end(self, *args, **kwargs):
        self.order.append(self)


class Fitting(LaplaceCallback):
    """Notes when it is called."""

    def on_train_end(self, *args, **kwargs):
        self.order.append(self)
        super().on_train_end(*args, **kwargs)


def examples(count):
    batch = token_batch((4,) * count)
    return [rows(batch, n) for n in range(count)]


def test_one_run_holds_everything_and_is_closed(tmp_path, monkeypatch):
    reporter = Reporter()
    monkeypatch.setattr(
        "transformers.trainer.get_reporting_integration_callbacks",
        lambda names: [reporter] if names else [],
    )
    order, begun = [], []
    first, last = Own(order, begun), Own(order, begun)
    arguments = quiet(tmp_path, report_to=["mlflow"], max_steps=2, logging_strategy="steps")
    trainer = Trainer(
        peft_model("bert", dtype=torch.float32),
        arguments,
        train_dataset=examples(6),
        eval_dataset=examples(4),
        callbacks=[first],
    )
    callback = Fitting(trainer, strict=True, save=False)
    callback.order = order
    trainer.add_callback(callback)
    trainer.add_callback(last)
    for times in (1, 2):
        trainer.train()
        assert len(reporter.runs) == times and not reporter.is_open
        assert {"train_loss", "laplace_log_marginal_likelihood", "eval_map_nll"} <= set(
            reporter.runs[-1]
        )
        assert order == [first, callback, last] * times and begun == [first, last] * times
        assert reporter.begun == times


class Heir(Reporter):
    """A reporter of somebody's own."""


@pytest.mark.parametrize("place", range(4))
def test_only_reporters_move(place):
    one, two, three = Reporter(), Own([], []), Heir()
    given = [one, two, three]
    given.insert(place, me := object())
    callbacks = list(given)
    reporters_behind(me, callbacks)
    before = callbacks[: callbacks.index(me)]
    assert not {one, three} & set(before) and callbacks[place + 1 :] == given[place + 1 :]
    for kind in ({two, me}, {one, three}):
        assert [c for c in callbacks if c in kind] == [c for c in given if c in kind]


def test_a_callback_that_is_called_by_hand_moves_nothing():
    callbacks = [Reporter()]
    reporters_behind(object(), callbacks)
    assert len(callbacks) == 1
