"""Open what is on disk: an adapter, the posterior beside it, and how its data are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laplace_lora
from laplace_lora.commands.reading.adapter import HEAD, SEQ2SEQ, Adapter, load_asked
from laplace_lora.commands.reading.decoder import begins_targets
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.likelihood import WITH_CLASSES
from laplace_lora.commands.reading.plan import PLAN, Plan, read_plan
from laplace_lora.commands.reading.planning import plan_again, why_no_eos
from laplace_lora.commands.reading.rows import Row
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.storage.files import TENSORS, read_files

UNPLANNED = f"the posterior was saved without {PLAN}, which says"


@dataclass(frozen=True)
class Opened:
    """A posterior that can be asked.

    Attributes:
        la: The posterior.
        adapter: Its model and tokenizer.
        plan: How rows are read.
    """

    la: LoraLaplace
    adapter: Adapter
    plan: Plan

    @property
    def inputs(self) -> Inputs:
        """From rows to the model's inputs."""
        return Inputs(self.adapter, self.plan)


def open_posterior(
    adapter: str,
    rows: Sequence[Row],
    options: dict[str, Any],
    completes: str | None = None,
    check: Callable[[str], None] = lambda likelihood: None,
) -> Opened:
    """Load an adapter and its posterior.

    Args:
        adapter: Folder or name of the adapter.
        rows: Data to be read.
        options: Of the command line.
        completes: See `plan_again`.
        check: Called with the likelihood before anything else is refused; raises if the command
            is not for it, and advice on options would be of no use.

    Raises:
        FileNotFoundError: If there is no posterior.
        ValueError: If model, posterior and data do not go together.
    """
    folder = options.get("posterior") or adapter
    if Path(folder).is_dir() and not (Path(folder) / TENSORS).is_file():
        raise FileNotFoundError(
            f"{folder} holds no posterior ({TENSORS}): make one by `laplace-lora fit`, or say "
            "where it is by --posterior"
        )
    _, config = read_files(folder)
    plan = read_plan(folder, config["content"])
    check(config["arguments"]["likelihood"])
    if options.get("load_in_4bit") is None:
        options = {**options, "load_in_4bit": plan is not None and plan.load_in_4bit}
    loaded = load_asked(adapter, options)
    if plan is None:
        plan = _plan_of(config, loaded, rows, options, completes)
    else:
        plan = plan_again(loaded, plan, rows, options, completes)
    la = getattr(laplace_lora, config["class"]).from_pretrained(loaded.model, folder)
    return Opened(la, loaded, plan)


def _plan_of(
    config: dict[str, Any],
    adapter: Adapter,
    rows: Sequence[Row],
    options: dict[str, Any],
    completes: str | None,
) -> Plan:
    """Return a plan for a posterior that was saved from Python."""
    likelihood, targets = (config["arguments"][name] for name in ("likelihood", "target_ids"))
    names: list[str] = []
    if targets is not None:
        names = [adapter.tokenizer.decode([token]) for token in targets]
        if adapter.kind == SEQ2SEQ and any(begins_targets(n, adapter.tokenizer) for n in names):
            raise ValueError(
                f"{UNPLANNED} what the decoder reads before an answer, and the tokenizer writes a "
                "token there. Fit by `laplace-lora fit`, or predict from Python, with the "
                "`decoder_input_ids` of the fit"
            )
    elif likelihood in WITH_CLASSES:
        names = adapter.names or list(map(str, range(adapter.outputs)))
    if options.get("chat") is None and adapter.kind != HEAD and adapter.tokenizer.chat_template:
        raise ValueError(
            f"{UNPLANNED} whether its texts went through the tokenizer's chat template; give "
            "--chat or --no-chat"
        )
    limit, are_answers = adapter.max_length, targets is not None
    plan = Plan(likelihood, names=names, targets=are_answers, max_length=limit)
    plan = plan_again(adapter, plan, rows, options, completes, knows_columns=False)
    is_reward = likelihood == completes == "reward_modeling"
    if options.get("eos") is None and is_reward and why_no_eos(adapter, plan, rows) is None:
        raise ValueError(
            f"{UNPLANNED} whether its texts end with the tokenizer's end-of-text token, as those "
            "of TRL's RewardTrainer do; give --eos or --no-eos"
        )
    return plan
