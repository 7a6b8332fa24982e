"""Make the plan of how rows are read, from options, adapter and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from laplace_lora.commands.reading.adapter import HEAD, SEQ2SEQ, Adapter
from laplace_lora.commands.reading.answers import answer_tokens
from laplace_lora.commands.reading.columns import (
    CHOSEN,
    REJECTED,
    Columns,
    are_pairs,
    columns_of,
    has_conversations_only,
    label_cells,
    text_column,
)
from laplace_lora.commands.reading.completions import check_second_text, completion_column
from laplace_lora.commands.reading.decoder import read_before
from laplace_lora.commands.reading.labels import classes_of
from laplace_lora.commands.reading.likelihood import (
    WITH_CLASSES,
    WITHOUT_LABELS,
    likelihood_asked,
)
from laplace_lora.commands.reading.names import class_names, read_as_numbered
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.rows import Row


def plan_fit(
    adapter: Adapter,
    rows: Sequence[Row] | None,
    options: dict[str, Any],
    named: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Plan:
    """Return how a fit reads its rows; without any, what the model and options alone say.

    Raises:
        ValueError: If model, answers and data do not go together.
    """
    asked = _asked_columns(options)
    columns, given = (asked, ()) if rows is None else (columns_of(rows, asked), rows)
    likelihood = likelihood_asked(adapter, given, columns, options)
    columns = _read_by(likelihood, columns, asked, given)
    if adapter.kind == HEAD:
        check_second_text(given, columns, asked, likelihood)
    of_data = named.get(columns.label or "", ())
    targets, names = list(options.get("targets") or ()), list(options.get("labels") or ())
    if targets:
        if names:
            raise ValueError("--target names the classes already; leave --labels out")
        names = targets
    elif likelihood in WITH_CLASSES:
        is_named = adapter.names or names or len(of_data) != adapter.outputs
        own = adapter.names if is_named else list(of_data)
        names = class_names(names, own, adapter.outputs)
    else:
        names = []
    plan = Plan(
        likelihood,
        columns,
        names,
        bool(targets),
        _uses_chat(adapter, columns, likelihood, options.get("chat"), given),
        options.get("max_length") or adapter.max_length,
        bool(options.get("load_in_4bit")),
        options.get("labels_as"),
    )
    plan = read_as_numbered(plan, named, options, "--data")
    if targets:
        tokens = answer_tokens(adapter, plan, rows)  # refuses what are none
        if adapter.kind == SEQ2SEQ:
            plan = replace(plan, decoder=read_before(adapter, names, tokens))
    if likelihood == "classification" and rows is not None:
        _, labels_as = classes_of(label_cells(rows, columns.label), names, plan.labels_as)
        plan = replace(plan, labels_as=labels_as)
    return _settled(plan, adapter, given, options)


def plan_again(
    adapter: Adapter,
    plan: Plan,
    rows: Sequence[Row],
    options: dict[str, Any],
    completes: str | None = None,
    knows_columns: bool = True,
) -> Plan:
    """Return how another command reads its rows: as the fit did, but for what options say.

    Args:
        adapter: The model.
        plan: Of the fit.
        rows: The data.
        options: Of the command line.
        completes: The likelihood whose completions the command reads; ``None`` for no likelihood.
        knows_columns: Whether the plan's columns are the fit's, and not to be found.

    Raises:
        ValueError: If a column or an end-of-text token is missing, an option has no effect, the
            number of names is another, two are the same, or a chat template is asked for and
            missing.
    """
    asked, known = _asked_columns(options), plan.columns if knows_columns else None
    columns = columns_of(rows, asked, known)
    is_completed = plan.likelihood == completes
    columns = _read_by(plan.likelihood, columns, asked, rows, known, is_completed)
    names = plan.names and class_names(options.get("labels") or (), plan.names, len(plan.names))
    chat = plan.chat
    if options.get("chat") is not None:
        chat = _uses_chat(adapter, columns, plan.likelihood, options["chat"])
    plan = replace(
        plan,
        columns=columns,
        names=names,
        chat=chat,
        max_length=options.get("max_length") or plan.max_length,
        labels_as=options.get("labels_as") or plan.labels_as,
    )
    return _settled(plan, adapter, rows, options)


def _settled(plan: Plan, adapter: Adapter, rows: Sequence[Row], options: dict[str, Any]) -> Plan:
    """Return a plan that says whether texts end with a token; refuse options without effect.

    Raises:
        ValueError: If an option has no effect.
    """
    if options.get("labels") and not plan.names:
        raise ValueError(f"--labels: a {plan.likelihood} posterior has no classes")
    asks_form = options.get("labels_as") is not None
    if asks_form and plan.likelihood == "multilabel":
        raise ValueError(
            "--labels-as: a multilabel posterior's labels are lists of names, or of a 0 or 1 for "
            "each class, which are told apart without it; leave it out"
        )
    if asks_form and plan.likelihood != "classification":
        raise ValueError(f"--labels-as: a {plan.likelihood} posterior has no classes to tell apart")
    return replace(plan, eos=appends_eos(adapter, plan, rows, options.get("eos")))


def _read_by(
    likelihood: str,
    columns: Columns,
    asked: Columns,
    rows: Sequence[Row],
    known: Columns | None = None,
    is_completed: bool = True,
) -> Columns:
    """Return the columns that a likelihood reads, completions among them; see `completion_column`.

    Raises:
        ValueError: If another one is asked for, or it is not clear which holds completions.
    """
    completion = completion_column(rows, columns, asked, likelihood, known, is_completed)
    columns = replace(columns, completion=completion)
    if likelihood not in WITHOUT_LABELS:
        return columns
    if asked.pair is not None:
        raise ValueError(f"--pair-field: a {likelihood} posterior reads no second text")
    if are_pairs(rows, likelihood) and asked.text in (CHOSEN, REJECTED):
        raise ValueError(
            f"--text-field {asked.text}: both columns of preference pairs are read without it, and "
            "it names the column of their prompts; leave it out. Rewards of single texts are "
            f"predicted of data that have only one of the columns {CHOSEN!r} and {REJECTED!r}"
        )
    columns = replace(columns, pair=None)
    if are_pairs(rows, likelihood) and known is not None and known.text is None:
        return replace(columns, text=asked.text)  # a prompt that no pair of the fit had
    return columns


def _asked_columns(options: dict[str, Any]) -> Columns:
    """Return the columns that options name."""
    roles = ("text", "pair", "completion", "label")
    return Columns(**{role: options.get(f"{role}_field") for role in roles})


def _uses_chat(
    adapter: Adapter,
    columns: Columns,
    likelihood: str,
    asked: bool | None,
    fitted: Sequence[Row] = (),
) -> bool:
    """Return whether texts go through the chat template; messages always do.

    Texts beside a fit on messages alone do by default, as all that the model was fitted on did.

    Raises:
        ValueError: If it is asked for, and there is none.
    """
    has_template = adapter.tokenizer.chat_template is not None
    if asked and not has_template:
        raise ValueError("--chat: the tokenizer has no chat template")
    if asked is not None:
        return asked
    if not has_template or columns.pair is not None:
        return False
    if has_conversations_only(fitted, text_column(fitted, columns, likelihood)):
        return True
    if adapter.kind == HEAD:
        return False
    # Plain texts without an answer are scored as they are.
    return likelihood != "language_modeling" or columns.completion is not None


def appends_eos(adapter: Adapter, plan: Plan, rows: Sequence[Row], asked: bool | None) -> bool:
    """Return whether plain texts have the token behind them: as asked, or as the plan says.

    Raises:
        ValueError: If the user says what has no effect.
    """
    if asked is None:
        return plan.eos
    reason = why_no_eos(adapter, plan, rows)
    if reason is not None:
        raise ValueError(f"{'--eos' if asked else '--no-eos'}: {reason}")
    return asked


def why_no_eos(adapter: Adapter, plan: Plan, rows: Sequence[Row]) -> str | None:
    """Return why nobody needs to say whether the token is read; ``None`` if somebody does."""
    if plan.likelihood not in WITHOUT_LABELS:
        return f"a {plan.likelihood} posterior reads texts as the tokenizer gives them"
    name = text_column(rows, plan.columns, plan.likelihood)
    if plan.chat or has_conversations_only(rows, name):
        return "conversations end as the chat template has them end"
    if plan.likelihood == "language_modeling" and plan.columns.completion is not None:
        return "completions always end with the token"
    if adapter.tokenizer.eos_token is None:
        return "the tokenizer has no end-of-text token"
    return None
