"""``laplace-lora predict``."""

from __future__ import annotations

from typing import Any

import click

from laplace_lora.commands.base import Command, Values
from laplace_lora.commands.options import (
    class_names_option,
    common_options,
    completion_options,
    data_options,
    model_options,
    out_option,
    posterior_option,
)


@click.command(cls=Command, short_help="Predict rows, and say how sure the model is.")
@model_options
@posterior_option
@data_options()
@completion_options("for a reward model's single texts: completion, answer or response")
@out_option
@click.option("--keep", cls=Values, help="Columns of the data to copy to the results.")
@class_names_option
@common_options
def predict(**options: Any) -> None:
    """Predict rows, and say how sure the model is: one JSON object for each, in their order.

    Rows are read as in the fit. A classifier's result has the prediction, the probabilities, the
    entropy, which is how unsure the model is in all, and the mutual information: the part of the
    entropy that more training data would remove. Both are in nats. A regression's and a reward
    model's result has mean and standard deviation. A regression's `std` is that of the mean alone;
    that of a label, with the observation noise, is `observation_std`.

    Examples:
      laplace-lora predict my-adapter --data new.jsonl --out answers.jsonl --keep id
      head -n 5 new.jsonl | laplace-lora predict my-adapter --data -
    """
    from laplace_lora.commands.predicting import run

    run(**options)
