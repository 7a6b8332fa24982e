"""Point out answers that may be other tokens than those of the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from laplace_lora.commands.base import point_out
from laplace_lora.commands.reading.adapter import CAUSAL, Adapter
from laplace_lora.commands.reading.answers import (
    alone,
    answer_tokens,
    prompts_with_space,
    quoted,
    spaced,
)
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.rows import Row


def warn_if_other_tokens(adapter: Adapter, plan: Plan, rows: Sequence[Row]) -> None:
    """Warn if answers are other tokens behind the prompts than alone, or without their space.

    Nothing beside an adapter says by which tokens it was trained to answer.
    """
    if not plan.targets or adapter.kind != CAUSAL:
        return
    tokenizer, ids = adapter.tokenizer, answer_tokens(adapter, plan, rows)
    of_alone = [alone(name, tokenizer) for name in plan.names]
    taken = f"behind the prompts, --target {quoted(plan.names)} means {_named(ids, tokenizer)}"
    others = [i for tokens in of_alone for i in tokens]
    if others != ids and all(len(tokens) == 1 for tokens in of_alone):
        way = "give their numbers from Python, as `target_ids`"
        if _tokens_of(spaced(plan.names), adapter, plan, rows) == others:
            way = f"say --target {quoted(spaced(plan.names))}"
        point_out(
            f"{taken}, which the posterior covers; alone it would be "
            f"{_named(others, tokenizer)}. If the adapter was trained to answer with these, {way}"
        )
    elif any(name != name.lstrip() for name in plan.names):
        bare = [name.lstrip() for name in plan.names]
        others = _tokens_of(bare, adapter, plan, rows)
        if Inputs(adapter, plan).is_conversation(rows[0]) and others not in ([], ids):
            point_out(
                f"{taken}. An assistant's messages seldom begin with a space: if those of "
                f"its training did not, say --target {quoted(bare)}, which means "
                f"{_named(others, tokenizer)}"
            )


def _tokens_of(names: list[str], adapter: Adapter, plan: Plan, rows: Sequence[Row]) -> list[int]:
    """Return the tokens of other answers; none if there is not one for each."""
    try:
        return answer_tokens(adapter, replace(plan, names=names), rows)
    except ValueError:
        return []


def _named(ids: Sequence[int], tokenizer: Any) -> str:
    names = tokenizer.convert_ids_to_tokens(ids)
    named = [f"{name!r} ({i})" for name, i in zip(names, ids, strict=True)]
    return f"the tokens {', '.join(named)}"


def warn_if_spaces_meet(adapter: Adapter, plan: Plan, rows: Sequence[Row]) -> None:
    """Warn if prompts end in a space before answers that begin with one."""
    if not plan.targets or plan.chat or adapter.kind != CAUSAL or plan.columns.text is None:
        return
    prompts = [row.get(plan.columns.text) for row in rows]
    count = len(prompts_with_space(prompts, plan.names, adapter.tokenizer))
    if count:
        point_out(
            f"{count} of {len(rows)} prompts end in a space, and answers among "
            f"{', '.join(map(repr, plan.names))} begin with one, so the model is asked for two "
            "spaces in a row. Leave it out of the prompts, if those of its training had none"
        )
