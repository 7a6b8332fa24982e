"""Options without an effect are refused by every command, as by the fit."""

import pytest

from laplace_lora.commands.reading.adapter import CAUSAL, HEAD, Adapter
from laplace_lora.commands.reading.columns import Columns
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.labels import classes_of
from laplace_lora.commands.reading.names import (
    applying,
    check_order,
    class_names,
    read_as_numbered,
)
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


def said(*contents):
    return [
        {"role": role, "content": x}
        for role, x in zip(("user", "assistant"), contents, strict=True)
    ]


CONVERSATIONS = {"chosen": said("the film", "good"), "rejected": said("the film", "bad")}
PAIR = {"chosen": "the film was good", "rejected": "the film was bad"}


def test_texts_after_a_fit_on_pairs_of_messages_go_through_the_chat_template():
    """As TRL's pairs with implicit prompts are, which have no column of prompts."""
    adapter = Adapter(None, tokenizer(chat=True), HEAD, 1, [], None, 24)
    plan = plan_fit(adapter, [CONVERSATIONS] * 2, {})
    assert plan.chat and plan.likelihood == "reward_modeling" and plan.columns.text is None
    assert plan_again(adapter, plan, [{"text": "the film"}], {}).chat
    assert not plan_fit(adapter, [CONVERSATIONS, PAIR], {}).chat
    assert not plan_fit(adapter, [PAIR], {}).chat


@pytest.mark.parametrize("name", ["prompt", "text", "sentence", "question", "messages"])
def test_a_column_that_no_pair_of_the_fit_had_is_no_prompt(name):
    adapter = Adapter(None, tokenizer(), HEAD, 1, [], None, 24)
    plan, rows = plan_fit(adapter, [PAIR], {}), [{name: "the meal", **PAIR}]
    assert plan_again(adapter, plan, rows, {}).columns.text is None
    assert plan_again(adapter, plan, rows, {"text_field": name}).columns.text == name
    assert plan_again(adapter, plan, [{name: "the meal"}], {}).columns.text == name
    assert plan_fit(adapter, rows, {}).columns.text == name
    with_prompt = plan_fit(adapter, [{"prompt": "the", **PAIR}], {})
    assert plan_again(adapter, with_prompt, [{"prompt": "a", **PAIR}], {}).columns.text == "prompt"


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("half", PAIR)
def test_half_of_a_pair_is_no_prompt(again, half):
    with pytest.raises(ValueError, match=f"--text-field {half}: both columns of preference pairs"):
        planned("reward_modeling", again, [PAIR], text_field=half)
    alone = [{half: PAIR[half]}]
    assert planned("reward_modeling", again, alone, text_field=half).columns.text == half
    labelled = [{**PAIR, "label": 1.0}]
    assert planned("regression", again, labelled, text_field=half).columns.text == half


def test_a_data_set_names_the_classes_of_a_model_that_has_no_names():
    rows, numbered = [{"text": "the film", "label": 1}], {"label": ["neg", "pos"]}

    def names(own, named=numbered, outputs=2, **options):
        adapter = Adapter(None, tokenizer(), HEAD, outputs, own, None, 24)
        return plan_fit(adapter, rows, options, named).names

    assert names([]) == ["neg", "pos"] and names([], {}) == ["0", "1"]
    assert names([], {"other": ["neg", "pos"]}) == ["0", "1"]
    assert names([], outputs=3) == ["0", "1", "2"]
    assert names(["bad", "good"]) == ["bad", "good"] == names([], labels=["bad", "good"])
    assert names(["neg", "pos"]) == ["neg", "pos"] == names([], labels=["neg", "pos"])
    for own, options in ((["pos", "neg"], {}), ([], {"labels": ["pos", "neg"]})):
        with pytest.raises(ValueError, match=r"'label' numbers .* order 'neg', 'pos', and the .*"):
            names(own, **options)


@pytest.mark.parametrize("data", [["good", "bad"], ["GOOD", "BAD", "fine"], ["bad", "so", "good"]])
def test_a_class_of_both_has_one_place(data):
    with pytest.raises(ValueError, match="numbers the classes in the order"):
        check_order(["Bad", "Good"], {"label": data}, "label", "--data rows")


@pytest.mark.parametrize("data", [["BAD", "good"], ["0", "1"], ["a", "b"], ["bad", "good", "so"]])
def test_other_names_and_mere_numbers_tell_nothing(data):
    check_order(["Bad", "Good"], {"label": data}, "label", "--data rows")
    check_order(["1", "0"], {"label": ["0", "1"]}, "label", "--data rows")


def test_a_later_file_may_have_names_where_a_data_set_gave_none():
    adapter = Adapter(None, tokenizer(), HEAD, 2, [], None, 24)
    plan = plan_fit(adapter, [{"text": "the film", "label": 1}], {}, {"label": ["0", "1"]})
    assert classes_of(["LABEL_1", "LABEL_0"], plan.names, plan.labels_as)[0] == [1, 0]


@pytest.mark.parametrize("names", [["1", "2"], ["1", "0"]])
def test_numbers_of_a_data_set_are_none_of_its_names(names):
    adapter = Adapter(None, tokenizer(), HEAD, 2, [], None, 24)
    rows, named = [{"text": "the film", "label": label} for label in (0, 1)], {"label": names}
    plan = plan_fit(adapter, rows, {}, named)
    assert plan.names == names
    assert classes_of([0, 1], plan.names, plan.labels_as)[0] == [0, 1]


@pytest.mark.parametrize(
    ("likelihood", "names", "data", "labels", "expected"),
    [
        ("classification", ["1", "2", "3"], ["1", "2", "3"], [1, 2], [1, 2]),
        ("classification", ["1", "2", "3"], ["a", "b", "c"], [1, 2], [1, 2]),
        ("classification", ["1", "2", "3"], [], [1, 2], [0, 1]),
        ("classification", ["1", "2", "3"], ["0", "1", "2"], [1, 2], [0, 1]),
        ("multilabel", ["a", "b"], ["a", "b"], [[0, 1], [1], []], [[1, 1], [0, 1], [0, 0]]),
        ("multilabel", ["0", "1"], ["a", "b"], [[0, 1], [1]], [[1, 1], [0, 1]]),
        ("multilabel", ["0", "1"], ["0", "1"], [[0, 1], [1]], [[1, 1], [0, 1]]),
        ("multilabel", ["a", "b", "c"], ["no", "yes"], [[0, 1, 1]], [[0, 1, 1]]),
        ("multilabel", ["a", "b"], [], [[0, 1], ["b"]], [[0, 1], [0, 1]]),
        ("multilabel", ["a"], ["no", "yes"], [0, 1], [[0], [1]]),
    ],
)
def test_a_file_says_whether_its_own_labels_are_numbers(likelihood, names, data, labels, expected):
    """Whatever the fit's were."""
    adapter = Adapter(None, tokenizer(), HEAD, len(names), [], None, 24)
    rows = [{"text": "the film", "label": label} for label in labels]
    forms = ("names",) if likelihood == "classification" else (None, "numbers")
    for form in forms:
        plan = Plan(likelihood, Columns("text", label="label"), names, labels_as=form)
        plan = read_as_numbered(plan, {"label": data} if data else {}, {}, "--val rows")
        found = [example["labels"] for example in Inputs(adapter, plan).labelled(rows)]
        assert found == expected


@pytest.mark.parametrize("label", [[0, 2], [0, -1], ["a"], [True], [0, None]])
def test_numbers_of_no_class_are_refused_in_lists(label):
    message = r"row 3 .* list of numbers of classes, from 0 to 1, as the data set says"
    with pytest.raises(ValueError, match=message):
        applying(label, ["a", "b"], 3, "numbers")
    with pytest.raises(ValueError, match=r"names a class twice; .* save them as plain numbers"):
        applying([1, 1], ["a", "b"], 3, "numbers")
