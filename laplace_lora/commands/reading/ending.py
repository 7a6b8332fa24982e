"""Whether the tokenizer's end-of-text token is put behind texts, as TRL's trainers do."""

from __future__ import annotations

from collections.abc import Sequence

from laplace_lora.commands.reading.adapter import Adapter
from laplace_lora.commands.reading.columns import has_conversations_only, text_column
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.rows import Row


def appends_eos(adapter: Adapter, plan: Plan, rows: Sequence[Row], asked: bool | None) -> bool:
    """Return whether plain texts are read with the token behind them.

    Args:
        adapter: The model.
        plan: How rows are read else, and whether the fit read the token.
        rows: The data; may be empty.
        asked: What the user says; ``None`` for what the plan says.

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
    if plan.likelihood not in ("reward_modeling", "language_modeling"):
        return f"a {plan.likelihood} posterior reads texts as the tokenizer gives them"
    name = text_column(rows, plan.columns, plan.likelihood)
    if plan.chat or has_conversations_only(rows, name):
        return "conversations end as the chat template has them end"
    if plan.likelihood == "language_modeling" and plan.columns.completion is not None:
        return "completions always end with the token"
    if adapter.tokenizer.eos_token is None:
        return "the tokenizer has no end-of-text token"
    return None
