"""``laplace-lora predict`` and ``laplace-lora evaluate``, which ask a posterior for predictions."""

from __future__ import annotations

from typing import Any

import click

from laplace_lora.commands.base import Command, Values
from laplace_lora.commands.options import (
    class_names_option,
    common_options,
    completion_options,
    data_options,
    label_options,
    model_options,
    out_option,
    posterior_option,
)


@click.command(cls=Command, short_help="Predict rows, and say how sure the model is.")
@model_options
@posterior_option
@data_options()
@completion_options("for a reward model's single texts: completion, answer or response")
@out_option
@click.option("--keep", cls=Values, help="Columns of the data to copy to the results.")
@class_names_option
@common_options
def predict(**options: Any) -> None:
    """Predict rows, and say how sure the model is: one JSON object for each, in their order.

    Rows are read as in the fit. A classifier's result has the prediction, the probabilities, the
    entropy, which is how unsure the model is in all, and the mutual information: the part of the
    entropy that more training data would remove. Both are in nats. A regression's and a reward
    model's result has mean and standard deviation. A regression's `std` is that of the mean alone;
    that of a label, with the observation noise, is `observation_std`.

    Examples:
      laplace-lora predict my-adapter --data new.jsonl --out answers.jsonl --keep id
      head -n 5 new.jsonl | laplace-lora predict my-adapter --data -
    """
    from laplace_lora.commands.predicting import run

    run(**options)


@click.command(cls=Command, short_help="Compare the posterior with the adapter alone (MAP).")
@model_options
@posterior_option
@data_options()
@click.option(
    "--group-field", metavar="NAME", help="Column by whose values rows are scored apart, too."
)
@click.option(
    "--apart",
    metavar="FILE",
    help="Labelled data that neither training nor calibration has seen: makes conformal sets of "
    "classes.",
)
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the sets of --apart that are to hold the label.  [default: 0.9]",
)
@click.option(
    "--risk",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Accepted share of wrong answers: finds on --apart the confidence above which to answer.",
)
@click.option("--ood", metavar="FILE", help="Data of another kind, to be told apart by entropy.")
@click.option(
    "--out",
    metavar="FILE",
    help="Where scores go as JSON, a list of MAP and Laplace; - is standard output, instead of the "
    "table.",
)
@click.option(
    "--plot",
    metavar="FILE",
    help="Reliability diagram, confidences and risk by coverage: .png, .pdf or .svg.",
)
@label_options
@common_options
def evaluate(**options: Any) -> None:
    """Compare the posterior with the adapter alone (MAP) on labelled data.

    Prints accuracy, negative log-likelihood (NLL, in nats), Brier score, calibration errors (ECE)
    and the area under the risk-coverage curve (AURC), each with its standard error. Of accuracy
    more is better, of these others less.

    With --apart every row gets a set of classes that holds its label with probability --coverage;
    printed are the share of sets that do, and their mean size. With --risk only rows above a
    confidence are answered, of which with 90 % certainty at most that share is wrong; printed are
    the share that is answered, and how many of these are wrong.

    Examples:
      laplace-lora evaluate my-adapter --data test.jsonl
      laplace-lora evaluate my-adapter --data test.jsonl --ood other.jsonl --plot report.png
      laplace-lora evaluate my-adapter --data test.jsonl --apart apart.jsonl --risk 0.05
    """
    from laplace_lora.commands.evaluating import run

    run(**options)
