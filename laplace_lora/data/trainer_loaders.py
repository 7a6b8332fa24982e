"""Loaders of a `transformers.Trainer` with every example of the data, and in their order.

A trainer leaves the last examples out with ``dataloader_drop_last``, also of evaluation and test
sets, and orders these by length where it groups training examples so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STRATEGY = "train_sampling_strategy"  # by length it reorders evaluation sets, too
OWN_SHARDS = "batch_rebalance"  # deals examples out to processes in its own way
PLAIN = "random"  # the trainer's default
EVERY_EXAMPLE = {"dataloader_drop_last": False, "dataloader_persistent_workers": False}
# Out of order, workers hand over whichever batch is ready first.
IN_ORDER = {
    STRATEGY: PLAIN,
    "group_by_length": False,  # what the first versions of transformers 5 call it
    "dataloader_in_order": True,
}


def whole_training_loader(trainer: Any) -> Any:
    """Return a trainer's training loader, with no example left out."""
    strategy = getattr(trainer.args, STRATEGY, PLAIN)
    changes = {STRATEGY: PLAIN} if strategy == OWN_SHARDS else {}
    with _changed(trainer.args, {**EVERY_EXAMPLE, **changes}):
        return trainer.get_train_dataloader()


def whole_evaluation_loaders(trainer: Any) -> dict[str, Any]:
    """Return the loader of each evaluation set, with all examples, by its metrics' prefix."""
    data = trainer.eval_dataset
    if data is None:
        return {}
    with _in_order(trainer.args):
        if isinstance(data, dict):
            return {f"eval_{name}": trainer.get_eval_dataloader(name) for name in data}
        return {"eval": trainer.get_eval_dataloader()}


def whole_test_loader(trainer: Any, dataset: Any) -> Any:
    """Return the loader of a test set, with all examples in their order."""
    with _in_order(trainer.args):
        return trainer.get_test_dataloader(dataset)


def _in_order(args: Any) -> Any:
    return _changed(args, {**EVERY_EXAMPLE, **IN_ORDER})


@contextmanager
def _changed(args: Any, changes: dict[str, Any]) -> Iterator[None]:
    """Let a trainer's arguments have other values in this block, those that it knows."""
    before = {name: getattr(args, name) for name in changes if hasattr(args, name)}
    try:
        for name in before:
            setattr(args, name, changes[name])
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
