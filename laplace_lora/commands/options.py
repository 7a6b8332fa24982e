"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from laplace_lora.commands.base import Values

F = TypeVar("F", bound=Callable[..., Any])

STRUCTURES = ("kron", "full", "diag")
LIKELIHOODS = (
    "classification",
    "multilabel",
    "regression",
    "reward_modeling",
    "language_modeling",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def joined(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Return one decorator for several, in the order of the help."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def model_options(function: F) -> F:
    """Add the adapter, and how it and its base model are loaded."""
    return joined(
        click.argument("adapter"),
        click.option("--base", help="Base model, a folder or a name, if not the adapter's own."),
        click.option("--load-in-4bit", is_flag=True, default=None, help="Quantise the base."),
        click.option("--device", help="Where to compute: cpu, cuda, cuda:1, ..."),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            help="Of the base model.",
        ),
    )(function)


def posterior_option(function: F) -> F:
    """Add where the posterior is."""
    return click.option(
        "--posterior",
        metavar="FOLDER",
        help="Where `fit --out` put the posterior, if not beside the adapter.",
    )(function)


def data_options(required: bool = True) -> Callable[[F], F]:
    """Add the data and their columns.

    Args:
        required: Whether the command cannot do without data.
    """
    return joined(
        click.option(
            "--data",
            required=required,
            metavar="FILE",
            help="JSON lines, CSV, a data set folder, or - for JSON lines on standard input.",
        ),
        click.option("--split", help="Split of a data set folder that has several."),
        click.option(
            "--text-field", metavar="NAME", help="Column of the text, the prompt or the messages."
        ),
        click.option("--pair-field", metavar="NAME", help="Column of a second text."),
        click.option(
            "--chat/--no-chat",
            default=None,
            help="Whether texts go through the tokenizer's chat template. By default prompts of "
            "language models do if it has one, and messages always do.",
        ),
        click.option(
            "--max-length",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="Longest input; by default what tokenizer and model take.",
        ),
        click.option(
            "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows."
        ),
    )


def label_options(function: F) -> F:
    """Add the column of the labels, and what they are called."""
    return joined(
        click.option("--label-field", metavar="NAME", help="Column of the label.  [label]"),
        click.option(
            "--labels",
            cls=Values,
            help="Names of the classes, in the order of the model's outputs.",
        ),
    )(function)


def task_options(function: F) -> F:
    """Add what the model is asked: answers, likelihood, structure."""
    return joined(
        click.option(
            "--target",
            "targets",
            cls=Values,
            help='Answers of a language model, one token each: --target " yes" " no".',
        ),
        click.option(
            "--likelihood",
            type=click.Choice(LIKELIHOODS),
            help="By default what adapter, targets and data say.",
        ),
        click.option(
            "--completion-field", metavar="NAME", help="Column of the text after a prompt."
        ),
        click.option(
            "--structure",
            type=click.Choice(STRUCTURES),
            default="kron",
            show_default=True,
            help="Low-rank K-FAC; the exact GGN, for up to a few thousand rows; or a diagonal.",
        ),
        click.option(
            "--uncovered",
            type=click.Choice(("error", "diag")),
            default="error",
            show_default=True,
            help="What becomes of trained weights that K-FAC cannot cover: refuse them, or give "
            "each a diagonal.",
        ),
    )(function)


def token_options(function: F) -> F:
    """Add what is kept of each token, and where results go."""
    return joined(
        click.option(
            "--out", default="-", metavar="FILE", help="JSON lines; - is standard output. [-]"
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=1),
            default=20,
            show_default=True,
            help="Tokens looked at.",
        ),
        click.option("--n-samples", type=click.IntRange(min=1), help="Samples of the weights."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the samples."),
    )(function)


def common_options(function: F) -> F:
    """Add the options of every command."""
    return joined(
        click.option("--quiet", "-q", is_flag=True, help="No progress and no notes."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    )(function)
