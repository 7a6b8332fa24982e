"""What ``laplace-lora predict`` does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from laplace_lora.commands.base import note
from laplace_lora.commands.output import check_writable, json_lines
from laplace_lora.commands.reading.columns import CHOSEN, REJECTED, are_pairs, listed, present_in
from laplace_lora.commands.reading.opened import Opened, open_posterior
from laplace_lora.commands.reading.rows import Row, read_rows
from laplace_lora.commands.reading.said import cuts_said, prompts_said
from laplace_lora.display.tables import plain
from laplace_lora.predictive.predictions import Predictions

# What results are called, by likelihood where they are moments.
CLASSES = ("prediction", "probabilities", "entropy", "mutual_information")
MOMENTS = {"regression": ("mean", "std", "observation_std"), "reward_modeling": ("reward", "std")}


def run(adapter: str, data: str, out: str, keep: Sequence[str], **options: Any) -> None:
    """Predict and write."""
    check_writable(out, data=[data])
    rows = read_rows(data, options["split"])
    present = present_in(rows)
    for name in keep:
        if name not in present:
            raise ValueError(f"--keep {name}: the data have {listed(present)}")
    check = partial(_check_is_of_rows, adapter)
    opened = open_posterior(adapter, rows, options, "reward_modeling", check)
    _check_kept(keep, opened, rows)
    found = predictions(opened, rows, options["batch_size"])
    with json_lines(out) as write:
        for row, result in zip(rows, result_rows(found, opened), strict=True):
            write({**{name: row.get(name) for name in keep}, **result})


def _check_is_of_rows(adapter: str, likelihood: str) -> None:
    if likelihood == "language_modeling":
        raise ValueError(
            f"the posterior is over texts: `laplace-lora score {adapter}` says which tokens it is "
            "unsure of, `laplace-lora generate` writes"
        )


def _check_kept(keep: Sequence[str], opened: Opened, rows: Sequence[Row]) -> None:
    """Refuse to keep a column under the name of a result, which would replace it."""
    likelihood = opened.plan.likelihood
    results = CLASSES if are_pairs(rows, likelihood) else MOMENTS.get(likelihood, CLASSES)
    for name in keep:
        if name in results:
            raise ValueError(
                f"--keep {name}: results have a {name!r} of their own, which would replace the "
                "column; rename it in the data"
            )


def predictions(opened: Opened, rows: Sequence[Row], batch_size: int) -> Predictions:
    """Return the predictions of rows, in their order."""
    inputs = opened.inputs
    data: Any
    if are_pairs(rows, opened.plan.likelihood):
        note(prompts_said(opened.plan, rows))
        data = inputs.loader(rows, batch_size)
        examples = data.dataset
    else:
        data = examples = inputs.texts(rows)
    note(cuts_said(inputs, examples, rows))
    found = opened.la.predict(data, opened.adapter.tokenizer, batch_size=batch_size)
    assert isinstance(found, Predictions)  # no command loads a token classifier
    return found


def result_rows(found: Predictions, opened: Opened) -> list[dict[str, Any]]:
    """Return one dictionary for each prediction."""
    values = found.to_dict()
    if found.probs is None:
        noise = float(opened.la.sigma_noise)
        moments = (found.mean, found.std, (found.std.square() + noise**2).sqrt())
        columns = dict(zip(MOMENTS[opened.plan.likelihood], map(plain, moments), strict=False))
        single = len(found.mean.T) == 1
        return [
            {k: v[i][0] if single else v[i] for k, v in columns.items()} for i in range(len(found))
        ]
    names = opened.plan.names or [REJECTED, CHOSEN]
    by_class = [dict(zip(names, row, strict=True)) for row in values["probs"]]
    uncertain: list[Any] = [values["entropy"], values["mutual_information"]]
    if found.has_independent_labels:
        predicted: list[Any] = [[n for n, p in row.items() if p > 0.5] for row in by_class]
        uncertain = [[dict(zip(names, row, strict=True)) for row in rows] for rows in uncertain]
    else:
        predicted = [names[i] for i in values["prediction"]]
    rows = zip(predicted, by_class, *uncertain, strict=True)
    return [dict(zip(CLASSES, row, strict=True)) for row in rows]
