"""``laplace-lora predict``."""

from __future__ import annotations

from typing import Any

import click

from laplace_lora.commands.base import Command, Values
from laplace_lora.commands.options import (
    common_options,
    data_options,
    label_options,
    model_options,
    posterior_option,
)


@click.command(cls=Command)
@model_options
@posterior_option
@data_options()
@click.option(
    "--out", default="-", metavar="FILE", help="JSON lines; - is standard output.  [default: -]"
)
@click.option("--keep", cls=Values, help="Columns of the data to copy to the results.")
@label_options
@common_options
def predict(**options: Any) -> None:
    """Predict rows by an adapter's posterior: one JSON object for each, in their order.

    Texts are read as in the fit. A classifier's row has its prediction, the probabilities, the
    entropy and the mutual information, its epistemic part, which more training data would remove
    (both in nats). A regression's and a reward model's has mean and standard deviation.

    Examples:
      laplace-lora predict my-adapter --data new.jsonl --out answers.jsonl --keep id
      head -n 5 new.jsonl | laplace-lora predict my-adapter --data -
    """
    from laplace_lora.commands.predicting import run

    run(**options)
