"""From rows of data to the model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from laplace_lora.commands.reading.adapter import CAUSAL, HEAD, Adapter
from laplace_lora.commands.reading.chat_template import (
    check_answer_written,
    template_takes,
    templated,
)
from laplace_lora.commands.reading.columns import (
    CHOSEN,
    REJECTED,
    check_text,
    label_cells,
    text_cell,
)
from laplace_lora.commands.reading.labels import classes_of, numbers_of
from laplace_lora.commands.reading.messages import ASSISTANT, USER, check_asks, check_says
from laplace_lora.commands.reading.names import applying
from laplace_lora.commands.reading.pairs import (
    are_same,
    check_one_form,
    padded_pairs,
)
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.rows import Row
from laplace_lora.commands.reading.too_long import cut_to, same_when_cut, too_long
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.predictive.special_tokens import check_ends_open

Example = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Tokenizes rows as a plan says.

    Attributes:
        adapter: The model and its tokenizer.
        plan: How rows are read.
    """

    adapter: Adapter
    plan: Plan

    def loader(self, rows: Sequence[Row], batch_size: int) -> DataLoader[Any]:
        """Return batches with labels, in the order of the rows.

        Raises:
            ValueError: If a row lacks a text or a label, or does not fit the model.
        """
        tokenizer, likelihood = self.adapter.tokenizer, self.plan.likelihood
        collate: Any
        if likelihood == "reward_modeling":
            examples = self.preferences(rows)
            collate = partial(padded_pairs, DataCollatorWithPadding(tokenizer))
        elif likelihood == "language_modeling":
            examples = [self.scored(row, n) for n, row in enumerate(rows, start=1)]
            collate = DataCollatorForSeq2Seq(tokenizer)
        else:
            examples = self.labelled(rows)
            collate = DataCollatorWithPadding(tokenizer)
        data: Any = examples
        return DataLoader(data, batch_size, collate_fn=collate)

    def labelled(self, rows: Sequence[Row]) -> list[Example]:
        """Return texts with their labels, which are all read in the same way."""
        examples = self.texts(rows)
        values = self._labels(label_cells(rows, self.plan.columns.label))
        return [{**x, "labels": y} for x, y in zip(examples, values, strict=True)]

    def _labels(self, labels: Sequence[Any]) -> list[Any]:
        if self.plan.likelihood == "multilabel":
            names, form = self.plan.names, self.plan.labels_as
            return [applying(y, names, n, form) for n, y in enumerate(labels, start=1)]
        if self.plan.likelihood == "regression":
            outputs = self.adapter.outputs
            return [numbers_of(y, n, outputs) for n, y in enumerate(labels, start=1)]
        return list(classes_of(labels, self.plan.names, self.plan.labels_as)[0])

    def texts(self, rows: Sequence[Row]) -> list[Example]:
        """Return what `text` makes of each row."""
        return [self.text(row, n) for n, row in enumerate(rows, start=1)]

    def text(self, row: Row, number: int) -> Example:
        """Return a text, the prompt that an answer follows, or for a reward model both."""
        columns = self.plan.columns
        content = text_cell(row, columns.text, number, "text", "--text-field")
        if self.adapter.kind != HEAD and isinstance(content, list) and columns.completion is None:
            check_asks(content, number, columns.text)
        if self.plan.likelihood == "reward_modeling" and columns.completion is not None:
            answer = text_cell(row, columns.completion, number, "completion", "--completion-field")
            content = self._after(content, answer, number)
        if self.plan.likelihood == "reward_modeling":
            content = self._ended(content)
        second = self.second(row)
        if second is not None:
            check_text(second, number, "second text", columns.pair)
        found = self._cut(content, second, number)
        if self.plan.decoder:
            found["decoder_input_ids"] = list(self.plan.decoder)
        return found

    def second(self, row: Row) -> Any:
        """Return a row's second text; an empty one is all that a table can say of a missing one."""
        name = self.plan.columns.pair
        value = None if name is None else row.get(name)
        return None if value == "" else value

    def preferences(self, rows: Sequence[Row]) -> list[Example]:
        """Return preference pairs, of which none differs only in what is cut off.

        Raises:
            ValueError: If some do.
        """
        pairs = [self.preference(row, n) for n, row in enumerate(rows, start=1)]
        uncut = Inputs(self.adapter, replace(self.plan, max_length=None))
        same = [
            n
            for n, (row, pair) in enumerate(zip(rows, pairs, strict=True), start=1)
            if are_same(pair) and not are_same(uncut.preference(row, n))
        ]
        if same and self.plan.max_length is not None:
            raise ValueError(same_when_cut(same, self.plan.max_length, self.adapter))
        return pairs

    def preference(self, row: Row, number: int) -> Example:
        """Return both texts of a preference pair, each with its prompt if there is one."""
        contents = {}
        for name in (CHOSEN, REJECTED):
            content = text_cell(row, name, number, f"{name} text", "that name")
            if self.plan.columns.text is not None:
                prompt = text_cell(row, self.plan.columns.text, number, "prompt", "--text-field")
                content = self._after(prompt, content, number)
            contents[name] = self._ended(content)
        check_one_form(contents, number)
        return {name: self._cut(content, None, number) for name, content in contents.items()}

    def answered(self, row: Row, answer: str) -> list[int]:
        """Return the tokens of a prompt that `text` takes, with an answer behind it."""
        prompt, second = row[self.plan.columns.text or ""], self.second(row)
        if isinstance(prompt, str) and second is not None:
            return list(self._tokens(prompt, second + answer, False)["input_ids"])
        own = _said_by(ASSISTANT, answer) if isinstance(prompt, list) else answer
        return list(self._tokens(self._after(prompt, own, 0), None, False)["input_ids"])

    def is_conversation(self, row: Row) -> bool:
        """Return whether a row's text goes through the chat template."""
        return self.plan.chat or isinstance(row.get(self.plan.columns.text or ""), list)

    def prompt_and_answer(self, row: Row, number: int) -> tuple[Any, Any]:
        """Return texts or messages of which the second is scored; of a whole text ``None`` first.

        Raises:
            ValueError: If a text is missing, or what follows the prompt is not the assistant's.
        """
        columns = self.plan.columns
        content = text_cell(row, columns.text, number, "text", "--text-field")
        if isinstance(content, list):
            name = columns.completion
            after = None if name is None else row.get(name)
            prompt, answer = content[:-1], content[-1:]
            if after is not None:
                check_text(after, number, "completion", name)
                own = _said_by(ASSISTANT, after) if isinstance(after, str) else list(after)
                prompt, answer = content, own
            if not prompt or answer[0].get("role") != ASSISTANT:
                raise ValueError(f"row {number}: the last message is not the assistant's")
            check_says(answer, number)
            return prompt, answer
        if columns.completion is None:
            if self.plan.chat:
                raise ValueError(
                    "a chat template needs to know the answer: name its column by "
                    "--completion-field, or give messages; --no-chat scores plain texts"
                )
            return None, content
        answer = text_cell(row, columns.completion, number, "completion", "--completion-field")
        if self.plan.chat:
            content, answer = _said_by(USER, content), _said_by(ASSISTANT, answer)
        return content, answer

    def scored(self, row: Row, number: int) -> Example:
        """Return a whole text, with labels where a language model is scored: after the prompt."""
        prompt, answer = self.prompt_and_answer(row, number)
        if prompt is None:
            whole = self._tokens(self._ended(answer), None, False)["input_ids"]
            return self._checked(whole, list(whole), number)
        with template_takes(number):
            start = self._tokens(prompt, None, True)["input_ids"]
            whole = self._tokens(prompt + answer, None, False)["input_ids"]
            if isinstance(answer, list):
                check_answer_written(prompt, answer, self.adapter.tokenizer)
        end = self.adapter.tokenizer.eos_token_id
        if not isinstance(prompt, list) and end is not None and whole[-1] != end:
            whole = [*whole, end]
        if whole[: len(start)] != start or len(whole) == len(start):
            raise ValueError(
                f"row {number}: prompt and answer together do not begin with the prompt's tokens, "
                "so which tokens are the answer's cannot be told; begin the answer, not end the "
                "prompt, with a space"
            )
        return self._checked(whole, [IGNORED] * len(start) + whole[len(start) :], number)

    def _after(self, prompt: Any, answer: Any, number: int) -> Any:
        """Return a prompt and the answer to it, as one text or one list of messages."""
        if isinstance(prompt, list) != isinstance(answer, list):
            raise ValueError(f"row {number}: prompt and answers must both be texts, or messages")
        if self.plan.chat and isinstance(prompt, str):
            return _said_by(USER, prompt) + _said_by(ASSISTANT, answer)
        return prompt + answer

    def _ended(self, content: Any) -> Any:
        """Return a plain text with the token behind it that the plan puts there, as TRL does."""
        if not self.plan.eos or self.plan.chat or not isinstance(content, str):
            return content
        end = self.adapter.tokenizer.eos_token
        return content if content.endswith(end) else content + end

    def _cut(self, content: Any, second: str | None, number: int) -> Example:
        """Return an input; one that is too long is cut for a head, and refused for an answer."""
        is_head = self.adapter.kind == HEAD
        with template_takes(number):
            found = self._tokens(content, second, not is_head)
        limit, length = self.plan.max_length, len(found["input_ids"])
        if not length:
            raise ValueError(f"row {number} has no tokens")
        if limit is None or length <= limit:
            return found
        if not is_head or isinstance(content, list) or self.plan.chat:
            raise ValueError(too_long(number, length, limit, self.adapter))
        return cut_to(limit, content, second, self.adapter.tokenizer, self.plan.eos)

    def _tokens(self, content: Any, second: str | None, asks: bool) -> Example:
        """Return a text's tokens, through the chat template where the plan says so."""
        tokenizer = self.adapter.tokenizer
        if isinstance(content, str) and self.plan.chat:
            if second is not None:
                raise ValueError("a chat template takes one text, not two; --no-chat takes both")
            content = _said_by(USER, content)
        if isinstance(content, str):
            found = dict(tokenizer(content, second))
            is_followed = asks and self.adapter.kind == CAUSAL
            if is_followed and found["input_ids"][-1:] == [tokenizer.eos_token_id]:
                check_ends_open(tokenizer)  # unless the text has the token itself
            return found
        return templated(content, tokenizer, asks)

    def _checked(self, ids: list[int], labels: list[int], number: int) -> Example:
        limit = self.plan.max_length
        if limit is not None and len(ids) > limit:
            raise ValueError(too_long(number, len(ids), limit, self.adapter))
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _said_by(role: str, text: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]
