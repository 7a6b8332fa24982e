"""What a trainer's loaders are asked for; its rows are counted in test_trainer."""

from types import SimpleNamespace

import pytest

from laplace_lora.data.trainer_loaders import (
    whole_evaluation_loaders,
    whole_test_loader,
    whole_training_loader,
)


def trainer_with(eval_dataset=None, **args):
    """A trainer whose loaders are the arguments that they were made with."""
    args = SimpleNamespace(**args)
    return SimpleNamespace(
        args=args,
        eval_dataset=eval_dataset,
        get_train_dataloader=lambda: dict(vars(args)),
        get_test_dataloader=lambda dataset: dict(vars(args)),
        get_eval_dataloader=lambda name=None: {"of": name, **vars(args)},
    )


@pytest.mark.parametrize(
    "grouped", [{"train_sampling_strategy": "group_by_length"}, {"group_by_length": True}]
)
def test_test_sets_are_not_grouped_whatever_the_version_calls_it(grouped):
    trainer = trainer_with(**grouped, dataloader_drop_last=True, seed=3)
    found = whole_test_loader(trainer, [])
    assert found.keys() == vars(trainer.args).keys()  # nothing that it does not know is set
    assert not found["dataloader_drop_last"] and found["seed"] == 3
    assert all(found[name] != value for name, value in grouped.items())
    assert all(getattr(trainer.args, name) == value for name, value in grouped.items())
    assert trainer.args.dataloader_drop_last


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [("group_by_length", True), ("sequential", True), ("batch_rebalance", False)],
)
def test_training_data_are_grouped_but_not_divided_by_their_own_sampler(strategy, kept):
    """Nothing tells which rows a rebalancing sampler gave to which process."""
    trainer = trainer_with(train_sampling_strategy=strategy, dataloader_drop_last=True)
    found = whole_training_loader(trainer)
    assert (found["train_sampling_strategy"] == strategy) == kept
    assert not found["dataloader_drop_last"]
    assert trainer.args.train_sampling_strategy == strategy


def test_evaluation_sets_have_their_names():
    assert whole_evaluation_loaders(trainer_with()) == {}
    assert whole_evaluation_loaders(trainer_with([])) == {"eval": {"of": None}}
    found = whole_evaluation_loaders(trainer_with({"one": [], "two": []}))
    assert found == {"eval_one": {"of": "one"}, "eval_two": {"of": "two"}}


def test_arguments_come_back_after_an_error():
    trainer = trainer_with(dataloader_drop_last=True)
    trainer.get_train_dataloader = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        whole_training_loader(trainer)
    assert trainer.args.dataloader_drop_last
