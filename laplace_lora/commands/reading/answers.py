"""Answer tokens of a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from laplace_lora.commands.reading.adapter import CAUSAL, Adapter
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.prompt_ends import rows_by_end
from laplace_lora.commands.reading.rows import Row

SHOWN = 4  # tokens of an error
NO_CHAT = (
    "give the prompts as texts that end where the answers of the training begin, with what it "
    "writes, and say --no-chat"
)


class _Prompt(NamedTuple):
    """A row, its number from 1, and the tokens of its prompt."""

    row: Row
    number: int
    start: list[int]


def answer_tokens(adapter: Adapter, plan: Plan, rows: Sequence[Row] | None) -> list[int]:
    """Return the token of each answer: for a decoder, the one with which it follows the prompts.

    Behind a line break or a bracket many tokenizers read a word as another token than alone. Of the
    training data `rows_by_end` are looked at; without any the answers are read alone.

    Raises:
        ValueError: If an answer is no single token, also where a prompt precedes it, follows some
            prompts as another token than others, two are the same, or there is only one.
    """
    if adapter.kind != CAUSAL or not rows:
        return target_tokens(plan.names, adapter.tokenizer)
    inputs = Inputs(adapter, plan)
    numbers = rows_by_end(inputs, rows)
    prompts = [_Prompt(rows[n - 1], n, inputs.text(rows[n - 1], n)["input_ids"]) for n in numbers]
    targets = _several(plan.names)
    found = _of_all(_following, inputs, prompts, targets)
    lacking = [(p, t) for t in targets for p in prompts if (p.number, t) not in found]
    if lacking:  # a training had the space before every answer or before none
        found = _of_all(_behind_space, inputs, prompts, targets)
        if any((p.number, t) not in found for t in targets for p in prompts):
            in_no_form = [(p, t) for p, t in lacking if (p.number, t) not in found]
            raise ValueError(_no_single(inputs, *(in_no_form or lacking)[0]))
    for target in targets:
        of_rows = {found[n, target]: n for n in reversed(numbers)}
        if len(of_rows) > 1:
            raise ValueError(_several_tokens(inputs, prompts, target, of_rows))
    return _different([found[numbers[0], target] for target in targets])


def target_tokens(targets: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the token of each answer alone.

    Raises:
        ValueError: If an answer is no single token, two are the same one, or there is only one.
    """
    found = []
    for target in _several(targets):
        ids = alone(target, tokenizer)
        if not _is_one_known(ids, tokenizer):
            raise ValueError(_not_one(target, tokenizer))
        found += ids
    return _different(found)


def alone(target: str, tokenizer: Any) -> list[int]:
    """Return the tokens of an answer that nothing precedes."""
    return list(tokenizer(target, add_special_tokens=False)["input_ids"])


def _of_all(
    form: Callable[[Inputs, _Prompt, str], int | None],
    inputs: Inputs,
    prompts: Sequence[_Prompt],
    targets: Sequence[str],
) -> dict[tuple[int, str], int]:
    """Return the tokens of answers in a form, by the number of a row and the answer; no others."""
    tokens = {(p.number, t): form(inputs, p, t) for p in prompts for t in targets}
    return {key: token for key, token in tokens.items() if token is not None}


def _following(inputs: Inputs, prompt: _Prompt, target: str) -> int | None:
    """Return the token with which an answer follows a prompt as it is written, if there is one."""
    tokenizer, start = inputs.adapter.tokenizer, prompt.start
    try:
        whole = inputs.answered(prompt.row, target)
    except TemplateError as error:
        raise ValueError(
            f"row {prompt.number}: the chat template takes no answer behind these messages "
            f"({error}); {NO_CHAT}"
        ) from error
    single, rest = alone(target, tokenizer), whole[len(start) :]
    is_one = rest and _text(rest[:1], tokenizer) == _text(single, tokenizer)
    if whole[: len(start)] == start and is_one and rest[0] != tokenizer.unk_token_id:
        return int(rest[0])
    bare = target.lstrip()
    if inputs.is_conversation(prompt.row) and 0 < len(bare) < len(target):
        return _following(inputs, prompt, bare)  # where the template writes the space itself
    return None


def _behind_space(inputs: Inputs, prompt: _Prompt, target: str) -> int | None:
    """Return an answer's token behind a space that the tokenizer takes for granted.

    Words that would run together have a space between them. Tokenizers that put one before a
    text read it as in the answer alone; with others the answer is to begin with it.
    """
    row, tokenizer = prompt.row, inputs.adapter.tokenizer
    text = inputs.second(row) or row[inputs.plan.columns.text or ""]
    single = alone(target, tokenizer)
    if inputs.is_conversation(row) or text != text.rstrip() or not _is_one_known(single, tokenizer):
        return None
    is_read = inputs.answered(row, f" {target.lstrip()}") == [*prompt.start, *single]
    return single[0] if is_read else None


def _no_single(inputs: Inputs, prompt: _Prompt, target: str) -> str:
    tokenizer, start = inputs.adapter.tokenizer, prompt.start
    single, whole = alone(target, tokenizer), inputs.answered(prompt.row, target)
    if not _is_one_known(single, tokenizer):
        return _not_one(target, tokenizer)
    begin = max(0, len(start) - SHOWN)
    ends, becomes, name = (
        tokenizer.convert_ids_to_tokens(ids)
        for ids in (start[begin:], whole[begin : len(start) + SHOWN], single)
    )
    advice = (
        "If there is a space between them, begin the answers, not end the prompts, with it: "
        f"--target {quoted(spaced(inputs.plan.names))}"
    )
    if inputs.is_conversation(prompt.row):
        advice = f"The chat template writes something else there: {NO_CHAT}"
    return (
        f"--target {target!r} is the token {name[0]!r} alone, but follows the prompt of row "
        f"{prompt.number} by no single token: the prompt ends in {ends}, which together with the "
        f"answer becomes {becomes}. {advice}; tokens of other ways to train are given from "
        "Python, as `target_ids`"
    )


def _several_tokens(
    inputs: Inputs, prompts: Sequence[_Prompt], target: str, of_rows: dict[int, int]
) -> str:
    (one, first), (other, second) = sorted(of_rows.items(), key=lambda item: item[1])[:2]
    names = inputs.adapter.tokenizer.convert_ids_to_tokens([one, other])
    others = spaced(inputs.plan.names)
    found = _of_all(_following, inputs, prompts, others)
    tokens = [{found.get((p.number, t)) for p in prompts} for t in others]
    is_one = all(len(of_one) == 1 and None not in of_one for of_one in tokens)
    way = f", or begin the answers with a space: --target {quoted(others)}" if is_one else ""
    return (
        f"--target {target!r} is the token {names[0]!r} behind the prompt of row {first}, "
        f"and {names[1]!r} behind that of row {second}; end all prompts alike{way}"
    )


def spaced(targets: Sequence[str]) -> list[str]:
    """Return answers with a space before each."""
    return [f" {target.lstrip()}" for target in targets]


def quoted(targets: Sequence[str]) -> str:
    """Return answers as they are written on a command line."""
    return " ".join(f'"{target}"' for target in targets)


def _is_one_known(ids: Sequence[int], tokenizer: Any) -> bool:
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


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
