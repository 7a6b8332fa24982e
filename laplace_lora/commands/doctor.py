"""``laplace-lora doctor``."""

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
