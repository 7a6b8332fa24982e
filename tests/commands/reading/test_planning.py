"""Options without an effect are refused by every command, as by the fit."""

import pytest

from laplace_lora.commands.reading.adapter import CAUSAL, HEAD, Adapter
from laplace_lora.commands.reading.columns import Columns
from laplace_lora.commands.reading.names import class_names
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.planning import plan_again, plan_fit
from support.on_disk import tokenizer

ROWS = [{"text": "the film", "second": "the meal", "text_pair": "the end", "label": 1.0}]
LIKELIHOODS = ("regression", "reward_modeling", "language_modeling")


def planned(likelihood, again, rows=ROWS, **options):
    kind = CAUSAL if likelihood == "language_modeling" else HEAD
    adapter = Adapter(None, tokenizer(), kind, 1, [], None, 24)
    if again:
        return plan_again(adapter, Plan(likelihood, Columns("text")), rows, options)
    return plan_fit(adapter, rows, {"likelihood": likelihood, **options})


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_options_of_classes_are_refused_where_there_are_none(likelihood, again):
    with pytest.raises(ValueError, match=f"--labels: a {likelihood} posterior has no classes"):
        planned(likelihood, again, labels=["bad", "good"])
    with pytest.raises(ValueError, match=f"--labels-as: a {likelihood} posterior has no classes"):
        planned(likelihood, again, labels_as="names")
    assert planned(likelihood, again).names == []


def test_texts_after_a_fit_on_messages_alone_go_through_the_chat_template():
    turns, text = {"text": [{"role": "user", "content": "the film"}]}, {"text": "the film"}
    for kind in (CAUSAL, HEAD):
        adapter = Adapter(None, tokenizer(chat=True), kind, 1, [], None, 24)
        assert plan_fit(adapter, [turns, turns], {}).chat
        assert not plan_fit(adapter, [turns, turns], {"chat": False}).chat
        assert not plan_fit(adapter, [turns, text], {}).chat
        assert not plan_fit(adapter, None, {}).chat


@pytest.mark.parametrize("again", [False, True])
def test_lists_of_classes_have_one_form(again):
    with pytest.raises(ValueError, match="--labels-as: a multilabel posterior's labels are lists"):
        planned("multilabel", again, labels_as="names")


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("likelihood", LIKELIHOODS[1:])
def test_second_texts_are_refused_where_none_is_read(likelihood, again):
    with pytest.raises(ValueError, match="reads no second text"):
        planned(likelihood, again, pair_field="second")
    assert planned(likelihood, again).columns.pair is None
    assert planned("regression", again, pair_field="second").columns.pair == "second"


@pytest.mark.parametrize("again", [False, True])
def test_the_model_s_classes_in_another_order_are_refused(again):
    own = ["bad", "fine", "good"]
    adapter = Adapter(None, tokenizer(), HEAD, 3, own, None, 24)
    rows = [{"text": "the film", "label": 1}]

    def planned(*labels):
        if again:
            plan = Plan("classification", Columns("text"), own)
            return plan_again(adapter, plan, rows, {"labels": labels}).names
        return plan_fit(adapter, rows, {"labels": labels}).names

    with pytest.raises(ValueError, match=r"'good', 'bad', 'fine'.* order 'bad', 'fine', 'good'"):
        planned("good", "bad", "fine")
    assert planned(*own) == own and planned("a", "b", "c") == ["a", "b", "c"]


@pytest.mark.parametrize("own", [["0", "1"], ["LABEL_0", "LABEL_1"]])
def test_the_numbers_of_classes_in_another_order_are_refused(own):
    assert class_names(own, [], 2) == own
    with pytest.raises(ValueError, match=f"has the order '{own[1]}', '{own[0]}'"):
        class_names(own[::-1], [], 2)
    answers = ["1", "0"]  # of a decoder, in the order of its target_ids
    assert class_names([], answers, 2) == answers
