"""``laplace-lora score``."""

from __future__ import annotations

from typing import Any

import click

from laplace_lora.commands.base import Command
from laplace_lora.commands.options import (
    SCORED,
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
