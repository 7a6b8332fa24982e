"""``laplace-lora fit``, and what says beforehand and afterwards what it does."""

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


@click.command(cls=Command, short_help="Fit a posterior around a trained adapter, and save it.")
@model_options
@data_options()
@click.option(
    "--val", metavar="FILE", help="Labelled data that training has not seen, to calibrate on."
)
@label_options
@task_options
@click.option(
    "--out", metavar="FOLDER", help="Where the posterior goes.  [default: beside the adapter]"
)
@click.option("--overwrite", is_flag=True, help="Replace a posterior that is there.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random numbers.")
@common_options
def fit(**options: Any) -> None:
    """Fit a posterior around a trained adapter, tune its prior, and save it beside the adapter.

    Give the data that the adapter was trained on, in the same form. Of a regression the observation
    noise is tuned as well. With --val, labelled data that training has not seen, the posterior's
    width and temperature, or a regression's noise, are then calibrated on them.

    What the model is, and the columns that it needs:
      a classifier               text [text_pair] label
      labels of any number       text label              (a list of those that apply)
      a regression               text label              (a number, or a list of several)
      a reward model             chosen rejected [prompt]
      answers by token           prompt label            --target yes no, or " yes" " no"
      a model that writes        prompt completion, or messages, or text
    Answers are written as behind the prompt: with a space behind "Answer:", mostly without one
    behind a line break or a chat template.
    Labels are the classes' names or their numbers from 0, all of them in one way. Other columns are
    named by --text-field and the like.

    Examples:
      laplace-lora fit my-adapter --data train.jsonl
      laplace-lora fit my-adapter --data train.csv --text-field review --labels bad good
      laplace-lora fit my-adapter --data train.jsonl --val val.jsonl --target yes no
      laplace-lora fit user/adapter --data folder:train --val folder:validation --out my-posterior
    """
    from laplace_lora.commands.fitting import run

    run(**options)


@click.command(cls=Command, short_help="Say beforehand what a fit would do, and what it needs.")
@model_options
@data_options(required=False)
@label_options
@task_options
@common_options
def doctor(**options: Any) -> None:
    """Say what a fit would do, before it: what is covered, what is refused, memory and time.

    Takes the options of `fit`, but for --val, --out, --overwrite and --seed. Without --data only
    the model is examined. With it the rows are read, memory is estimated from one forward pass, and
    time from ten batches. Nothing is written. Ends with status 1 if a fit would be refused or would
    not fit in memory.

    Examples:
      laplace-lora doctor my-adapter
      laplace-lora doctor my-adapter --data train.jsonl --structure full --batch-size 16
    """
    from laplace_lora.commands.examination import run

    run(**options)


@click.command(cls=Command, short_help="Say what a saved posterior is.")
@click.argument("posterior")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def info(posterior: str, as_json: bool, debug: bool) -> None:
    """Say what a saved posterior is: what it covers, its prior, its sizes and its fingerprints.

    POSTERIOR is the folder or the repository where it lies, usually that of its adapter. The model
    is not loaded; the files are checked against their hashes.

    Examples:
      laplace-lora info my-adapter
      laplace-lora info my-adapter --json
    """
    from laplace_lora.commands.description import run

    run(posterior, as_json)
