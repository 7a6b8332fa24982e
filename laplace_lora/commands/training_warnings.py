"""Point out what a fit may read otherwise than the training of the adapter did.

Nothing beside an adapter says how it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.commands.base import point_out
from laplace_lora.commands.reading.adapter import CAUSAL, Adapter
from laplace_lora.commands.reading.answers import (
    alone,
    answer_tokens,
    quoted,
    spaced,
)
from laplace_lora.commands.reading.columns import CHOSEN, are_pairs, listed
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.planning import why_no_eos
from laplace_lora.commands.reading.rows import Row
from laplace_lora.evaluation import MAP

PAIRS = 32
SPACES = (" ", "▁", "Ġ")  # as texts, SentencePiece's and GPT-2's vocabularies have them
ROUNDING = 0.01  # of the loss: smaller differences may be those of half precision


def warn_if_trained_otherwise(
    adapter: Adapter, plan: Plan, rows: Sequence[Row], options: dict[str, Any]
) -> None:
    """Warn of all that a fit may read otherwise; the arguments as in `warn_if_trained_with_eos`."""
    warn_if_trained_with_eos(adapter, plan, rows, options)
    warn_if_other_tokens(adapter, plan, rows)
    warn_if_spaces_meet(adapter, plan, rows)


def warn_if_other_tokens(adapter: Adapter, plan: Plan, rows: Sequence[Row]) -> None:
    """Warn if answers are other tokens behind the prompts than alone, or without their space."""
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
    count = prompts_with_space(prompts, plan.names, adapter.tokenizer)
    if count:
        point_out(
            f"{count} of {len(rows)} prompts end in a space, and answers among "
            f"{listed(plan.names)} begin with one, so the model is asked for two "
            "spaces in a row. Leave it out of the prompts, if those of its training had none"
        )


def prompts_with_space(prompts: Sequence[Any], targets: Sequence[str], tokenizer: Any) -> int:
    """Return how many prompts end in a space before answers that begin with one.

    No text has the tokens of such a prompt and its answer: it would have two spaces. Messages,
    which a template ends, never do; a tokenizer that reads no spaces has none to meet.
    """
    begins = [i for target in targets for i in alone(target, tokenizer)[:1]]
    names = tokenizer.convert_ids_to_tokens(begins)
    if not any(str(name).startswith(SPACES) for name in names):
        return 0
    found = [text for text in prompts if isinstance(text, str) and text.endswith(" ")]
    is_read = any(
        tokenizer(text)["input_ids"] != tokenizer(text.rstrip(" "))["input_ids"]
        for text in found[:1]
    )
    return len(found) if is_read else 0


def warn_if_trained_with_eos(
    adapter: Adapter, plan: Plan, rows: Sequence[Row], options: dict[str, Any]
) -> None:
    """Warn if a reward model's loss on some plain pairs is lower with the token behind each text.

    The plan reads them without it.
    """
    pairs = [row for row in rows if isinstance(row.get(CHOSEN), str)]
    is_asked = options["eos"] is None and are_pairs(rows, plan.likelihood)
    if not is_asked or why_no_eos(adapter, plan, rows) is not None:
        return
    count = min(len(pairs), PAIRS)
    some = [pairs[i * len(pairs) // count] for i in range(count)]
    plain, with_token = (Inputs(adapter, replace(plan, eos=eos)) for eos in (False, True))
    some = [row for row in some if _takes(with_token, row)]
    count = len(some)
    if count < 2:
        return
    without, ended = (
        _losses(inputs, some, options["batch_size"]) for inputs in (plain, with_token)
    )
    gain = without - ended
    error = float(gain.std()) / math.sqrt(count)
    if gain.mean() > max(2 * error, ROUNDING * float(without.mean())):
        point_out(
            f"the adapter's mean loss on {count} of the pairs is {without.mean():.3g} "
            f"nats, and {ended.mean():.3g} with the end-of-text token "
            f"{adapter.tokenizer.eos_token!r} behind their texts, where TRL's RewardTrainer puts "
            "it. The adapter seems to have been trained with it: say --eos, or --no-eos to go on "
            "without it"
        )


def _takes(inputs: Inputs, row: Row) -> bool:
    """Return whether a pair is read, and not refused as the same texts once the token is there."""
    try:
        inputs.preferences([row])
    except ValueError:
        return False
    return True


def _losses(inputs: Inputs, rows: Sequence[Row], batch_size: int) -> Tensor:
    """Return the loss of each pair at the MAP weights, in nats, shape ``(pairs,)``."""
    model = MAP(inputs.adapter.model)
    rewards = torch.cat([model.logits(batch) for batch in inputs.loader(rows, batch_size)])
    chosen_wins = torch.ones(len(rewards), dtype=torch.long, device=rewards.device)
    return F.cross_entropy(rewards.double(), chosen_wins, reduction="none")
