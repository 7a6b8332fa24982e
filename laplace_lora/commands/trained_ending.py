"""Warn where a reward model was trained with an end-of-text token that is not read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.commands.base import point_out
from laplace_lora.commands.reading.adapter import Adapter
from laplace_lora.commands.reading.columns import CHOSEN, is_preference
from laplace_lora.commands.reading.ending import why_no_eos
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.rows import Row
from laplace_lora.evaluation import MAP

PAIRS = 32
ROUNDING = 0.01  # of the loss: smaller differences may be those of half precision


def warn_if_trained_with_eos(
    adapter: Adapter, plan: Plan, rows: Sequence[Row], options: dict[str, Any]
) -> None:
    """Warn if a reward model's loss on some plain pairs is lower with the token behind each text.

    Nothing beside an adapter says how it was trained.

    Args:
        adapter: The model.
        plan: How a fit reads its rows, without the token.
        rows: The training data.
        options: Of the command line.
    """
    pairs = [row for row in rows if isinstance(row.get(CHOSEN), str)]
    is_asked = options["eos"] is None and plan.likelihood == "reward_modeling"
    is_open = is_asked and is_preference(rows) and why_no_eos(adapter, plan, rows) is None
    count = min(len(pairs), PAIRS)
    if not is_open or count < 2:
        return
    some = [pairs[i * len(pairs) // count] for i in range(count)]
    without, ended = (
        _losses(Inputs(adapter, replace(plan, eos=eos)), some, options["batch_size"])
        for eos in (False, True)
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


def _losses(inputs: Inputs, rows: Sequence[Row], batch_size: int) -> Tensor:
    """Return the loss of each pair at the MAP weights, in nats, shape ``(pairs,)``."""
    model = MAP(inputs.adapter.model)
    rewards = torch.cat([model.logits(batch) for batch in inputs.loader(rows, batch_size)])
    chosen_wins = torch.ones(len(rewards), dtype=torch.long, device=rewards.device)
    return F.cross_entropy(rewards.double(), chosen_wins, reduction="none")
