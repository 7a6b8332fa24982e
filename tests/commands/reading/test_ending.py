"""Plain texts are read with the end-of-text token behind them where the plan says so."""

from dataclasses import replace

import pytest

from laplace_lora.commands.reading.adapter import CAUSAL, HEAD, Adapter
from laplace_lora.commands.reading.columns import Columns
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import PLAN, Plan, plan_text, read_plan
from laplace_lora.commands.reading.planning import appends_eos
from support.on_disk import WORDS, tokenizer

PAIR = {"chosen": "the film was good", "rejected": "the film was bad"}
TURNS = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
REWARD, TEXTS = "reward_modeling", "language_modeling"


def adapter(kind, chat=False):
    return Adapter(None, tokenizer(chat), kind, 1, [], None, 24)


def inputs(likelihood, chat=False, columns=Columns("text"), **plan):  # noqa: B008
    kind = HEAD if likelihood == REWARD else CAUSAL
    return Inputs(adapter(kind, chat), Plan(likelihood, columns, chat=chat, eos=True, **plan))


def words(example):
    return " ".join(WORDS[i] for i in example["input_ids"])


def test_texts_of_a_reward_model_end_once():
    pairs = inputs(REWARD, columns=Columns())
    found = pairs.preference({**PAIR, "rejected": "the film was bad[EOS]"}, 1)
    assert words(found["chosen"]) == "the film was good [EOS]"
    assert words(found["rejected"]) == "the film was bad [EOS]"
    asked = inputs(REWARD).preference({"text": "the ", "chosen": "film", "rejected": "meal"}, 1)
    assert words(asked["chosen"]) == "the film [EOS]"
    assert words(inputs(REWARD).text({"text": "the film"}, 1)) == "the film [EOS]"
    both = inputs(REWARD, columns=Columns("text", completion="completion"))
    single = both.text({"text": "the ", "completion": "film"}, 1)
    assert words(single) == "the film [EOS]" and len(single["attention_mask"]) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_is_cut_ends_too(side):
    short = inputs(REWARD, max_length=3)
    short.adapter.tokenizer.truncation_side = side
    kept = {"left": "was good [EOS]", "right": "the film [EOS]"}
    assert words(short.text({"text": PAIR["chosen"]}, 1)) == kept[side]


def test_whole_texts_of_a_language_model_end_with_a_label():
    found = inputs(TEXTS).scored({"text": "the film"}, 1)
    assert words(found) == "the film [EOS]" and found["labels"] == found["input_ids"]
    assert words(inputs(TEXTS).text({"text": "the film"}, 1)) == "the film"  # goes on


def test_conversations_and_completions_end_as_they_did():
    def found(likelihood, call, row, **options):
        ended = inputs(likelihood, **options)
        plain = replace(ended, plan=replace(ended.plan, eos=False))
        assert getattr(ended, call)(row, 1) == getattr(plain, call)(row, 1)

    chat = {"chat": True}
    found(REWARD, "preference", {"chosen": TURNS, "rejected": TURNS}, columns=Columns(), **chat)
    found(REWARD, "text", {"text": "the film"}, **chat)
    found(TEXTS, "scored", {"text": TURNS}, **chat)
    both = Columns("text", completion="completion")
    found(TEXTS, "scored", {"text": "the film", "completion": " was"}, columns=both)
    found("regression", "text", {"text": "the film"})


@pytest.mark.parametrize(
    ("likelihood", "plan", "row", "message"),
    [
        ("classification", {}, {"text": "a"}, "a classification posterior reads texts as the"),
        ("regression", {}, {}, "a regression posterior reads texts as the"),
        (REWARD, {}, {"chosen": TURNS, "rejected": TURNS}, "conversations end as the chat"),
        (REWARD, {"chat": True}, PAIR, "conversations end as the chat"),
        (TEXTS, {}, {"text": TURNS}, "conversations end as the chat"),
        (TEXTS, {"columns": Columns("text", completion="b")}, {"text": "a", "b": "c"}, "always"),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_the_switch_is_refused_where_it_has_no_effect(likelihood, plan, row, message, asked):
    plan = Plan(**{"likelihood": likelihood, "columns": Columns("text"), **plan})
    with pytest.raises(ValueError, match=f"{'--eos' if asked else '--no-eos'}: .*{message}"):
        appends_eos(adapter(HEAD), plan, [row] if row else [], asked)
    for eos in (True, False):
        assert appends_eos(adapter(HEAD), replace(plan, eos=eos), [row], None) is eos


def test_a_tokenizer_without_the_token():
    plain = adapter(HEAD)
    plain.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="--eos: the tokenizer has no end-of-text token"):
        appends_eos(plain, Plan(REWARD), [PAIR], True)
    assert appends_eos(adapter(HEAD), Plan(REWARD), [PAIR], True)


def test_plans_of_earlier_versions_read_no_token(tmp_path):
    path = tmp_path / PLAN
    for eos in (True, False):
        path.write_text(plan_text(Plan(REWARD, eos=eos), "a"))
        assert read_plan(str(tmp_path), "a").eos is eos
    path.write_text(path.read_text().replace(',\n "eos": false', ""))
    assert "eos" not in path.read_text() and read_plan(str(tmp_path), "a").eos is False
