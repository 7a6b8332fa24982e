"""``laplace-lora evaluate``."""

from __future__ import annotations

from typing import Any

import click

from laplace_lora.commands.base import Command
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
@click.option("--ood", metavar="FILE", help="Data of another kind, to be told apart by entropy.")
@click.option("--out", metavar="FILE", help="The scores as one JSON object.")
@click.option("--plot", metavar="FILE", help="Reliability diagram and more, .png or .pdf.")
@label_options
@common_options
def evaluate(**options: Any) -> None:
    """Compare the posterior with the adapter alone (MAP) on labelled data.

    Prints accuracy, negative log-likelihood (nats), calibration error, Brier score and the area
    under the risk-coverage curve, each with its standard error.

    Examples:
      laplace-lora evaluate my-adapter --data test.jsonl
      laplace-lora evaluate my-adapter --data test.jsonl --ood other.jsonl --plot report.png
    """
    from laplace_lora.commands.evaluating import run

    run(**options)
