"""``laplace-lora score`` and ``laplace-lora generate``, which look at tokens."""

from __future__ import annotations

from typing import Any

import click

from laplace_lora.commands.base import Command
from laplace_lora.commands.options import (
    SCORED,
    WRITTEN,
    common_options,
    completion_options,
    data_options,
    model_options,
    posterior_option,
    token_options,
)


@click.command(cls=Command, short_help="Say which tokens of texts a language model is unsure of.")
@model_options
@posterior_option
@data_options()
@completion_options("that of the fit, or completion, answer or response, if one is there")
@token_options(SCORED)
@common_options
def score(**options: Any) -> None:
    """Say which tokens of given texts a language model is unsure of, and why.

    Rows are texts, prompts with completions, or messages, as in the fit; completions and last
    messages are scored. Each result has the text's log probability under the posterior and under
    the adapter alone (MAP), and for each token its probability, entropy and mutual information:
    what of the entropy is epistemic, in nats.

    Examples:
      laplace-lora score my-adapter --data answers.jsonl --out scored.jsonl
      laplace-lora score my-adapter --data plain.jsonl --text-field text --no-chat
    """
    from laplace_lora.commands.tokens import run_score

    run_score(**options)


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
