"""``laplace-lora generate``."""

from __future__ import annotations

from typing import Any

import click

from laplace_lora.commands.base import Command
from laplace_lora.commands.options import (
    WRITTEN,
    common_options,
    data_options,
    model_options,
    posterior_option,
    token_options,
)


@click.command(cls=Command, short_help="Continue prompts, and say how sure each token is.")
@model_options
@posterior_option
@data_options()
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="TOKENS",
    help="Longest continuation.",
)
@click.option(
    "--do-sample",
    is_flag=True,
    help="Draw tokens among the --top-k likeliest instead of taking the likeliest. What is drawn "
    "depends on --seed and --batch-size.",
)
@click.option(
    "--stop-above",
    type=click.FloatRange(min=0),
    metavar="NATS",
    help="End a text when the mutual information of a token passes this.",
)
@token_options(WRITTEN)
@common_options
def generate(**options: Any) -> None:
    """Continue prompts, and say of each token how sure the model is.

    Rows are prompts or messages, as in the fit. Results are those of `score`, for what was written.
    With --stop-above a text ends where the model does not know how to go on; `stopped` says so.

    Examples:
      laplace-lora generate my-adapter --data prompts.jsonl --out written.jsonl
      echo '{"prompt": "The capital of Mali is"}' | laplace-lora generate my-adapter --data -
    """
    from laplace_lora.commands.tokens import run_generate

    run_generate(**options)
