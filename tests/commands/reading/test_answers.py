"""Prompts that end in a space, before answers that begin with one, are pointed out."""

import pytest

from laplace_lora.commands.fitting import warn_if_spaces_meet
from laplace_lora.commands.reading.adapter import CAUSAL, SEQ2SEQ, Adapter
from laplace_lora.commands.reading.columns import Columns
from laplace_lora.commands.reading.plan import Plan
from support.on_disk import tokenizer

ROWS = [{"text": "ab: "}, {"text": "ab:"}, {"text": [{"role": "user", "content": "ab "}]}]


class Spaced:
    """A tokenizer of GPT-2's kind in which a space may begin a word."""

    words = ("<unk>", "a", "b", ":", "Ġ", "Ġyes", "Ġno", "yes", "no")
    unk_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        text, ids = text.replace(" ", "Ġ"), []
        while text:
            word = max(filter(text.startswith, self.words), key=len)
            ids.append(self.words.index(word))
            text = text[len(word) :]
        return {"input_ids": ids}

    def convert_ids_to_tokens(self, ids):
        return [self.words[i] for i in ids]


@pytest.mark.parametrize(
    ("names", "kind", "chat", "count"),
    [
        ([" yes", " no"], CAUSAL, False, 1),
        (["yes", "no"], CAUSAL, False, 0),
        ([" yes", " no"], CAUSAL, True, 0),
        ([" yes", " no"], SEQ2SEQ, False, 0),
    ],
)
def test_two_spaces_in_a_row_are_pointed_out(names, kind, chat, count, capsys):
    adapter = Adapter(None, Spaced(), kind, 0, [], None, 24)
    plan = Plan("classification", Columns("text"), names, targets=True, chat=chat)
    warn_if_spaces_meet(adapter, plan, ROWS)
    said = capsys.readouterr().err
    assert said.count("1 of 3 prompts end in a space, and answers among ' yes', ' no'") == count
    assert bool(said) == bool(count)


def test_a_tokenizer_without_spaces_has_none_to_meet(capsys):
    adapter = Adapter(None, tokenizer(), CAUSAL, 0, [], None, 24)
    plan = Plan("classification", Columns("text"), [" yes", " no"], targets=True)
    warn_if_spaces_meet(adapter, plan, [{"text": "the film "}])
    assert not capsys.readouterr().err
