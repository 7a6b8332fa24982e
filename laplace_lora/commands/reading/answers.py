"""Answer tokens of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laplace_lora.commands.reading.adapter import CAUSAL, Adapter
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.rows import Row

SPACES = (" ", "▁", "Ġ")  # as texts, SentencePiece's and GPT-2's vocabularies have them
LOOKED_AT = 8  # rows
SHOWN = 4  # tokens of an error


def answer_tokens(adapter: Adapter, plan: Plan, rows: Sequence[Row] | None) -> list[int]:
    """Return the token of each answer: for a decoder, the one with which it follows the prompts.

    Behind a line break or a bracket many tokenizers read a word as another token than alone.

    Args:
        adapter: The model.
        plan: How rows are read, and the answers.
        rows: The training data, some of which are looked at; ``None`` for the answers alone.

    Raises:
        ValueError: If an answer is no single token, also where a prompt precedes it, follows some
            prompts as another token than others, two are the same, or there is only one.
    """
    if adapter.kind != CAUSAL or not rows:
        return target_tokens(plan.names, adapter.tokenizer)
    inputs, count = Inputs(adapter, plan), min(len(rows), LOOKED_AT)
    numbers = [1 + i * len(rows) // count for i in range(count)]
    starts = {n: inputs.text(rows[n - 1], n)["input_ids"] for n in numbers}
    found: list[int] = []
    for target in _several(plan.names):
        of_rows = {_following(inputs, rows[n - 1], n, starts[n], target): n for n in numbers}
        if len(of_rows) > 1:
            (one, first), (other, second) = list(of_rows.items())[:2]
            names = adapter.tokenizer.convert_ids_to_tokens([one, other])
            raise ValueError(
                f"--target {target!r} is the token {names[0]!r} behind the prompt of row {first}, "
                f"and {names[1]!r} behind that of row {second}; end all prompts alike"
            )
        found += of_rows
    return _different(found)


def target_tokens(targets: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the token of each answer alone.

    Args:
        targets: Two answers or more.
        tokenizer: The model's.

    Raises:
        ValueError: If an answer is no single token, two are the same one, or there is only one.
    """
    found = []
    for target in _several(targets):
        ids = alone(target, tokenizer)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(_not_one(target, tokenizer))
        found += ids
    return _different(found)


def alone(target: str, tokenizer: Any) -> list[int]:
    """Return the tokens of an answer that nothing precedes."""
    return list(tokenizer(target, add_special_tokens=False)["input_ids"])


def prompts_with_space(prompts: Sequence[Any], targets: Sequence[str], tokenizer: Any) -> list[int]:
    """Return which prompts end in a space before answers that begin with one.

    No text has the tokens of such a prompt and its answer: it would have two spaces.

    Args:
        prompts: Texts; messages, which a chat template ends, never do.
        targets: The answers.
        tokenizer: The model's; one that reads no spaces has none to meet.
    """
    begins = [i for target in targets for i in alone(target, tokenizer)[:1]]
    names = tokenizer.convert_ids_to_tokens(begins)
    if not any(str(name).startswith(SPACES) for name in names):
        return []
    found = [n for n, text in enumerate(prompts) if isinstance(text, str) and text.endswith(" ")]
    ends = [prompts[n] for n in found[:1]]
    is_read = any(
        tokenizer(text)["input_ids"] != tokenizer(text.rstrip(" "))["input_ids"] for text in ends
    )
    return found if is_read else []


def _following(inputs: Inputs, row: Row, number: int, start: list[int], target: str) -> int:
    """Return the token with which an answer follows a row's prompt.

    Args:
        inputs: Tokenizes rows.
        row: The row.
        number: The row's, from 1.
        start: Tokens of its prompt.
        target: The answer.

    Raises:
        ValueError: If there is no such token.
    """
    tokenizer, whole = inputs.adapter.tokenizer, inputs.answered(row, target)
    single, rest = alone(target, tokenizer), whole[len(start) :]
    if whole[: len(start)] == start and _text(rest[:1], tokenizer) == _text(single, tokenizer):
        if rest[0] == tokenizer.unk_token_id:
            raise ValueError(_not_one(target, tokenizer))
        return int(rest[0])
    if len(single) != 1 or single[0] == tokenizer.unk_token_id:
        raise ValueError(_not_one(target, tokenizer))
    # Words that would run together have a space between them, which some tokenizers take for
    # granted; with others the answer is to begin with it.
    is_chat = inputs.is_conversation(row)
    if not is_chat and inputs.answered(row, f" {target}") == [*start, *single]:
        return single[0]
    begin = max(0, len(start) - SHOWN)
    ends, becomes, name = (
        tokenizer.convert_ids_to_tokens(ids)
        for ids in (start[begin:], whole[begin : len(start) + SHOWN], single)
    )
    advice = "If there is a space between them, begin the answers, not end the prompts, with it"
    if is_chat:
        advice = (
            "The chat template writes something else there: give the prompts as texts that end "
            "where the answers of the training begin, with what it writes, and say --no-chat"
        )
    raise ValueError(
        f"--target {target!r} is the token {name[0]!r} alone, but follows the prompt of row "
        f"{number} by no single token: the prompt ends in {ends}, which together with the answer "
        f"becomes {becomes}. {advice}; tokens of other ways to train are given from Python, as "
        "`target_ids`"
    )


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids)).strip() if ids else ""


def _not_one(target: str, tokenizer: Any) -> str:
    ids = alone(target, tokenizer)
    return (
        f"--target {target!r} is {len(ids)} tokens of this tokenizer, "
        f"{tokenizer.convert_ids_to_tokens(ids)}; every answer must be one known token. A space "
        "before the word often makes the difference"
    )


def _several(targets: Sequence[str]) -> Sequence[str]:
    if len(targets) < 2:
        raise ValueError(f"--target needs two answers or more, got {targets[0]!r}")
    return targets


def _different(tokens: list[int]) -> list[int]:
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"--target: two answers are the same token, {tokens}")
    return tokens
