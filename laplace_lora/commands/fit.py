"""``laplace-lora fit``."""

from __future__ import annotations

from typing import Any

import click

from laplace_lora.commands.base import Command
from laplace_lora.commands.options import (
    common_options,
    data_options,
    label_options,
    model_options,
    task_options,
)


@click.command(cls=Command)
@model_options
@data_options()
@click.option("--val", metavar="FILE", help="Labelled data that the fit leaves out: calibrate.")
@label_options
@task_options
@click.option("--out", metavar="FOLDER", help="Where the posterior goes.  [beside the adapter]")
@click.option("--overwrite", is_flag=True, help="Replace a posterior that is there.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampled labels.")
@common_options
def fit(**options: Any) -> None:
    """Fit a posterior around a trained adapter, tune its prior, and save it beside the adapter.

    Give the data that the adapter was trained on, read in the same way. With --val the posterior's
    width and temperature are then calibrated on labelled data that training has not seen.

    What the model is, and the columns that it needs:
      a classifier               text [text_pair] label
      labels of any number       text label              (a list of those that apply)
      a regression               text label              (a number)
      a reward model             chosen rejected [prompt]
      answers by token           prompt label            --target " yes" " no"
      a model that writes        prompt completion, or messages, or text
    A label is a class's name or its number. Other columns are named by --text-field and the like.

    Examples:
      laplace-lora fit my-adapter --data train.jsonl
      laplace-lora fit my-adapter --data train.csv --text-field review --labels bad good
      laplace-lora fit my-adapter --data train.jsonl --val val.jsonl --target " yes" " no"
      laplace-lora fit user/adapter --data data-set/ --split train --out my-posterior
    """
    from laplace_lora.commands.fitting import run

    run(**options)
