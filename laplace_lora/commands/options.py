"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

from laplace_lora.commands.base import Values
from laplace_lora.commands.reading.labels import FORMS

Decorator = Callable[[Any], Any]

STRUCTURES = ("kron", "full", "diag")
LIKELIHOODS = (
    "classification",
    "multilabel",
    "regression",
    "reward_modeling",
    "language_modeling",
)
SCORED, WRITTEN = 32, 16  # samples by default, as in generation, which imports torch
DTYPES = ("auto", "float32", "bfloat16", "float16")


def joined(*decorators: Decorator) -> Decorator:
    """Return one decorator for several, in the order of the help."""
    return lambda function: reduce(lambda f, add: add(f), reversed(decorators), function)


model_options = joined(
    click.argument("adapter"),
    click.option(
        "--base",
        metavar="MODEL",
        help="Base model, a folder or a name on the hub.  [default: the one that the adapter "
        "names]",
    ),
    click.option(
        "--load-in-4bit",
        is_flag=True,
        default=None,
        help="Quantise the base model to four bits; needs bitsandbytes. Later commands repeat "
        "what the fit did.",
    ),
    click.option(
        "--device",
        metavar="DEVICE",
        help="Where to compute: cpu, cuda, cuda:1, ...  [default: cuda if there is one]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="Dtype of the base model; auto is that of its file.",
    ),
)

posterior_option = click.option(
    "--posterior",
    metavar="FOLDER",
    help="Where `fit --out` put the posterior, if not beside the adapter.",
)


def data_options(required: bool = True) -> Decorator:
    """Add the data and their columns.

    Args:
        required: Whether the command cannot do without data.
    """
    return joined(
        click.option(
            "--data",
            required=required,
            metavar="FILE",
            help="JSON lines, CSV, a data set folder (FOLDER:SPLIT for one of its splits), or - "
            "for JSON lines on standard input.",
        ),
        click.option("--split", help="The same as --data FOLDER:SPLIT."),
        click.option(
            "--text-field",
            metavar="NAME",
            help="Column of the text, the prompt or the messages.  [default: that of "
            "the fit, or text, prompt, messages, sentence, question]",
        ),
        click.option(
            "--pair-field", metavar="NAME", help="Column of a second text.  [default: text_pair]"
        ),
        click.option(
            "--chat/--no-chat",
            default=None,
            help="Whether texts go through the tokenizer's chat template. By default prompts of "
            "language models do if it has one, texts after a fit on messages do, and messages "
            "always do.",
        ),
        click.option(
            "--max-length",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="Longest input.  [default: what tokenizer and model take]",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            metavar="ROWS",
            help="Rows that run together; fewer take less memory.",
        ),
    )


class_names_option = click.option(
    "--labels",
    cls=Values,
    help="Names of the classes, in the order of the model's outputs.  [default: those of the "
    "fit, of the model's configuration, of a data set folder, or numbers]",
)

label_options = joined(
    click.option(
        "--label-field",
        metavar="NAME",
        help="Column of the label.  [default: that of the fit, or label, labels]",
    ),
    class_names_option,
    click.option(
        "--labels-as",
        type=click.Choice(FORMS),
        help="What labels are that may be either: names of the classes, or their numbers from "
        "0.  [default: as in the fit, or what all labels of the file can be]",
    ),
)


def completion_options(default: str) -> Decorator:
    """Add the column of completions, and how texts without them end.

    Args:
        default: What is read without the column, for the help.
    """
    return joined(
        click.option(
            "--completion-field",
            metavar="NAME",
            help=f"Column of the text after a prompt.  [default: {default}]",
        ),
        click.option(
            "--eos/--no-eos",
            default=None,
            help="Whether plain texts of a reward model, and whole texts of a language model, are "
            "read with the tokenizer's end-of-text token behind them, where TRL's RewardTrainer "
            "and SFTTrainer put it.  [default: as in the fit; a fit reads none]",
        ),
    )


task_options = joined(
    click.option(
        "--target",
        "targets",
        cls=Values,
        help="Answers of a language model, one token each, written as behind the prompt: "
        '--target yes no, or with the space before them, --target " yes" " no".',
    ),
    click.option(
        "--likelihood",
        type=click.Choice(LIKELIHOODS),
        help="What the model is trained for.  [default: what adapter, --target and data say]",
    ),
    completion_options("completion, answer or response"),
    click.option(
        "--structure",
        type=click.Choice(STRUCTURES),
        default="kron",
        show_default=True,
        help="Which posterior: kron, low-rank Kronecker factors; full, the exact curvature, "
        "for up to a few thousand rows; diag, the least memory.",
    ),
    click.option(
        "--uncovered",
        type=click.Choice(("error", "diag")),
        default="error",
        show_default=True,
        help="Trained weights that Kronecker factors cannot cover: refuse the adapter, or give "
        "each such weight a variance of its own.",
    ),
)

out_option = click.option(
    "--out",
    default="-",
    show_default=True,
    metavar="FILE",
    help="Where results go, as JSON lines; - is standard output.",
)


def token_options(samples: int) -> Decorator:
    """Add what is kept of each token, and where results go.

    Args:
        samples: How many of the weights are drawn by default.
    """
    return joined(
        out_option,
        click.option(
            "--top-k",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="The likeliest tokens in each place, which are compared one by one.  "
            "[default: 20, or all of a smaller vocabulary]",
        ),
        click.option(
            "--n-samples",
            type=click.IntRange(min=1),
            metavar="COUNT",
            help=f"Samples of the weights; more are more accurate.  [default: {samples}]",
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, help="Of the random numbers."
        ),
    )


common_options = joined(
    click.option("--quiet", "-q", is_flag=True, help="No progress and no notes."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)
