"""Rows become the inputs that their plan says, or are refused by their number."""

import json
from dataclasses import replace

import pytest

from laplace_lora.commands.reading.adapter import CAUSAL, HEAD, SEQ2SEQ, Adapter
from laplace_lora.commands.reading.columns import Columns, columns_of, is_preference
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.labels import classes_of, numbers_of
from laplace_lora.commands.reading.messages import are_written_out
from laplace_lora.commands.reading.names import applying
from laplace_lora.commands.reading.plan import Plan
from support.on_disk import WORDS, tokenizer

TEXT = Columns(text="text", pair="text_pair", completion="completion", label="label")


def inputs(likelihood="classification", kind=HEAD, chat=False, columns=TEXT, **plan):
    adapter = Adapter(None, tokenizer(chat), kind, 2, [], None, 24)
    return Inputs(adapter, Plan(likelihood, columns, ["bad", "good"], chat=chat, **plan))


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def test_a_second_text_belongs_to_the_input():
    row = {"text": "the film", "text_pair": "was bad", "label": "good"}
    (found,) = inputs().labelled([row])
    assert found["input_ids"] == tokenizer()("the film", "was bad")["input_ids"]
    assert found["labels"] == 1
    alone = inputs(columns=Columns(text="text")).text(row, 1)
    assert alone["input_ids"] == ids("the film")
    with pytest.raises(ValueError, match="takes one text, not two"):
        inputs(chat=True).text(row, 1)


def test_an_empty_second_text_is_none():
    """A table's empty cell, which a tokenizer would end like a text."""
    from tokenizers.processors import TemplateProcessing

    pairs = inputs()
    pairs.adapter.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A [EOS]", pair="$A [EOS] $B [EOS]", special_tokens=[("[EOS]", 2)]
    )
    found = [pairs.text({"text": "the film", "text_pair": x}, 1) for x in ("", None, "bad")]
    assert [x["input_ids"] for x in found[:2]] == [ids("the film [EOS]")] * 2
    assert found[2]["input_ids"] == ids("the film [EOS] bad [EOS]")


def test_no_decoder_goes_on_behind_a_token_that_ends_texts():
    from tokenizers.processors import TemplateProcessing

    def ended(*args, **options):
        found = inputs(*args, columns=Columns("text", completion="completion"), **options)
        found.adapter.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A [EOS]", special_tokens=[("[EOS]", 2)]
        )
        return found

    row = {"text": "the film was", "completion": " good"}
    for kind in (HEAD, SEQ2SEQ):
        assert ended(kind=kind).text(row, 1)["input_ids"] == ids("the film was [EOS]")
    texts = ended("language_modeling", CAUSAL)
    for call in (ended(kind=CAUSAL).text, texts.text, texts.scored):
        with pytest.raises(ValueError, match=r"ends every text with '\[EOS\]'.*add_eos_token"):
            call(row, 1)
    whole = replace(texts, plan=replace(texts.plan, columns=Columns("text")))
    assert whole.scored(row, 1)["labels"] == ids("the film was [EOS]")
    closed = {"text": "the film [EOS]"}  # by its writer
    own = inputs("language_modeling", CAUSAL).text(closed, 1)
    assert own["input_ids"] == ids("the film [EOS]")


def test_half_a_character_is_named_with_its_row():
    with pytest.raises(ValueError, match=r"row 2: its column 'text' holds half of a character"):
        inputs().text({"text": "the \ud83d film"}, 2)


@pytest.mark.parametrize("label", ["nan", float("inf"), [float("nan")]])
def test_a_regression_s_label_is_finite(label):
    one = Adapter(None, tokenizer(), HEAD, 1, [], None, 24)
    regression = Inputs(one, Plan("regression", TEXT))
    with pytest.raises(ValueError, match=r"row 1 has the label .* expected finite numbers"):
        regression.labelled([{"text": "the film", "label": label}])


@pytest.mark.parametrize("label", [True, [1.0, False], "yes", None])
def test_what_is_no_number_is_no_regression_s_label(label):
    with pytest.raises(ValueError, match=r"row 2 has the label .*, no number"):
        numbers_of(label, 2, 2)


@pytest.mark.parametrize("value", [42, 4.2, True, ["the film"], {"role": "user"}])
def test_what_is_neither_text_nor_messages_is_refused_as_such(value):
    row = {"text": value, "text_pair": value, "completion": value, "chosen": value}
    both, plain = inputs("language_modeling", CAUSAL), inputs("reward_modeling", columns=Columns())
    for call in (
        lambda: inputs().text(row, 3),
        lambda: inputs().text({**row, "text": "the film"}, 3),
        lambda: both.scored(row, 3),
        lambda: both.scored({**row, "text": "the film"}, 3),
        lambda: plain.preference({**row, "rejected": "was"}, 3),
    ):
        with pytest.raises(ValueError, match=r"row 3: its column .* neither a text nor a list of"):
            call()


TURNS = [{"role": "user", "content": "the 'film'\n"}, {"role": "assistant", "content": "good"}]
WRITTEN = {
    "json": json.dumps(TURNS),
    "indented": json.dumps(TURNS, indent=1),
    "python": str(TURNS),
    "numpy": " " + str(TURNS).replace("}, {", "}\n {"),  # as pandas writes what parquet holds
    "single": f"[{TURNS[0]}]",
}


@pytest.mark.parametrize("form", WRITTEN)
def test_messages_that_a_table_has_made_texts_of_are_refused(form):
    written = WRITTEN[form]
    row = dict.fromkeys(("text", "completion", "chosen", "rejected"), written)
    both, pairs = inputs("language_modeling", CAUSAL), inputs("reward_modeling", columns=Columns())
    for name, call in (
        ("text", lambda: inputs().text(row, 3)),
        ("text", lambda: both.scored(row, 3)),
        ("completion", lambda: both.scored({**row, "text": "the film"}, 3)),
        ("chosen", lambda: pairs.preference(row, 3)),
        ("rejected", lambda: pairs.preference({**row, "chosen": "was"}, 3)),
    ):
        with pytest.raises(ValueError, match=rf"row 3: its column '{name}' holds messages as a .*"):
            call()


@pytest.mark.parametrize(
    "text", ["[film] was good", "[{'film'}]", '[{"film": 1}]', "[1, 2]", "[{" * 9000, "[[{was"]
)
def test_texts_that_begin_like_a_list_are_texts(text):
    assert not are_written_out(text, "text")


def test_a_column_of_messages_holds_no_texts():
    chat = inputs(kind=CAUSAL, chat=True, columns=Columns(text="messages"))
    with pytest.raises(ValueError, match=r"row 1: its column 'messages' .* as JSON lines, or"):
        chat.text({"messages": "the film"}, 1)


def test_a_prompt_that_holds_its_answer_is_refused_where_the_next_token_is_read():
    row = {"text": TURNS, "chosen": TURNS, "rejected": TURNS}
    for likelihood, kind in (("classification", CAUSAL), ("language_modeling", CAUSAL)):
        asked = inputs(likelihood, kind, chat=True, columns=Columns("text"))
        with pytest.raises(
            ValueError, match=r"row 3: the last message in its column 'text' is the"
        ):
            asked.text(row, 3)
    scored = inputs("language_modeling", CAUSAL, chat=True, columns=Columns("text"))
    assert scored.scored(row, 3)["labels"][-2:] == ids("good [EOS]")
    assert inputs(chat=True).text(row, 3)["input_ids"][-2:] == ids("good [EOS]")
    assert inputs("reward_modeling", chat=True, columns=Columns()).preference(row, 3)
    few = [*TURNS, {"role": "user", "content": "the film"}]
    asked = inputs(kind=CAUSAL, chat=True)
    assert asked.text({"text": few}, 1)["input_ids"][-2:] == ids("assistant :")


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ({}, "nothing"),
        ({"content": None}, "null"),
        ({"content": 7}, "7"),
        ({"content": []}, r"\[\]"),
    ],
)
def test_messages_without_a_content_are_refused(content, written):
    row = {"text": [TURNS[0], {"role": "user", **content}]}
    turn = [{"role": "assistant", **content}]
    both, pairs = inputs("language_modeling", CAUSAL, chat=True), inputs("reward_modeling")
    for place, name, call in (
        (2, "text", lambda: inputs(chat=True).text(row, 3)),
        (2, "text", lambda: both.scored(row, 3)),
        (1, "completion", lambda: both.scored({"text": TURNS, "completion": turn}, 3)),
        (1, "chosen", lambda: pairs.preference({"chosen": turn}, 3)),
    ):
        message = f"row 3: message {place} in its column '{name}' has {written} as its content"
        with pytest.raises(ValueError, match=message):
            call()


def test_calls_of_tools_and_empty_messages_have_a_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    row = {"text": [{"role": "system", "content": ""}, TURNS[0], call, TURNS[1]]}
    both = inputs("language_modeling", CAUSAL, chat=True)
    assert both.scored(row, 1)["labels"][-2:] == ids("good [EOS]")
    template = both.adapter.tokenizer.chat_template
    both.adapter.tokenizer.chat_template = template.replace(
        "m['content'] }}", "m['content'] or m['tool_calls'][0]['name'] }}"
    )
    called = both.scored({"text": [TURNS[0], {**call, "content": ""}]}, 1)
    assert called["labels"][-2:] == ids("[UNK] [EOS]")


def test_an_answer_in_which_the_assistant_says_nothing_is_refused():
    nothing, both = {"role": "assistant", "content": ""}, inputs("language_modeling", CAUSAL)
    for row in (
        {"text": [TURNS[0], nothing]},
        {"text": TURNS[:1], "completion": [nothing]},
        {"text": TURNS[:1], "completion": ""},
    ):
        with pytest.raises(ValueError, match="row 3: the assistant's answer is empty"):
            replace(both, adapter=inputs(kind=CAUSAL, chat=True).adapter).scored(row, 3)


def test_parts_that_a_template_does_not_read_are_refused():
    row = {"text": [{"role": "user", "content": [{"type": "text", "text": "the film"}]}]}
    chat = inputs(chat=True)
    with pytest.raises(
        ValueError, match=r"row 3: .* \(it writes a content of several parts as it "
    ):
        chat.text(row, 3)
    chat.adapter.tokenizer.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    assert chat.text(row, 3)["input_ids"] == ids("the film")


def test_messages_that_a_template_does_not_take_are_named():
    raising = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    )
    row = {"text": [{"role": "system", "content": "film"}, *TURNS]}
    both, pairs = (
        inputs("language_modeling", CAUSAL, chat=True),
        inputs("reward_modeling", chat=True),
    )
    head = inputs(chat=True)
    for call in (
        lambda: head.text(row, 3),
        lambda: both.scored(row, 3),
        lambda: pairs.preference({"text": row["text"], "chosen": TURNS, "rejected": TURNS}, 3),
    ):
        for found in (head, both, pairs):
            found.adapter.tokenizer.chat_template = raising
        with pytest.raises(
            ValueError, match=r"row 3: the chat template .* \(No system\)\. .*--no-ch"
        ):
            call()


def test_a_completion_is_scored_after_its_prompt_and_ends():
    row = {"text": "the film was", "completion": " bad"}
    found = inputs("language_modeling", CAUSAL).scored(row, 1)
    assert found["input_ids"] == ids("the film was bad [EOS]")
    assert found["labels"] == [-100] * 3 + ids("bad [EOS]")
    found = inputs("language_modeling", CAUSAL, chat=True).scored(row, 1)
    assert found["input_ids"] == ids("user : the film was assistant : bad [EOS]".replace("  ", " "))
    assert found["labels"] == [-100] * 7 + ids("bad [EOS]")


@pytest.mark.parametrize("completion", ["bad", [{"role": "assistant", "content": "bad"}]])
def test_a_completion_follows_the_messages_before_it(completion):
    """TRL's conversational form, whose prompt may end with either's message."""
    turn, said = {"role": "user", "content": "the"}, {"role": "assistant", "content": "film was"}
    model = inputs("language_modeling", CAUSAL, chat=True)
    for prompt in ([turn], [turn, said]):
        found = model.scored({"text": prompt, "completion": completion}, 1)
        assert found["labels"][-2:] == ids("bad [EOS]")
        assert set(found["labels"][:-2]) == {-100}
        whole = [*prompt, {"role": "assistant", "content": "bad"}]
        assert found["input_ids"] == model.scored({"text": whole}, 1)["input_ids"]


def test_whole_texts_are_scored_where_there_is_no_completion():
    found = inputs("language_modeling", CAUSAL, columns=Columns(text="text"))
    assert found.scored({"text": "the film"}, 1)["labels"] == ids("the film")


def test_a_prompt_that_melts_into_its_answer_is_refused():
    row = {"text": "the fi", "completion": "lm was"}
    with pytest.raises(ValueError, match="row 7: prompt and answer together do not begin"):
        inputs("language_modeling", CAUSAL).scored(row, 7)


def test_preferences_take_their_prompt():
    row = {"text": "the film ", "chosen": "was good", "rejected": "was bad"}
    columns = Columns(text="text")
    found = inputs("reward_modeling", columns=columns).preference(row, 1)
    assert found["chosen"]["input_ids"] == ids("the film was good")
    assert found["rejected"]["input_ids"] == ids("the film was bad")
    asked = inputs("reward_modeling", columns=columns, chat=True).preference(row, 1)
    assert asked["chosen"]["input_ids"] == ids("user : the film assistant : was good [EOS]")
    messages = {**row, "chosen": [{"role": "assistant", "content": "good"}]}
    with pytest.raises(ValueError, match="row 2: prompt and answers must both be texts"):
        inputs("reward_modeling", columns=columns).preference(messages, 2)
    single = inputs("reward_modeling").text({"text": "the film ", "completion": "was good"}, 1)
    assert single == found["chosen"]


@pytest.mark.parametrize("call", ["text", "scored"])
def test_inputs_that_are_too_long_or_empty(call):
    long = {"text": "the film was good " * 9, "completion": " bad"}
    with pytest.raises(ValueError, match=r"row 3 has 3\d tokens, more than 24"):
        getattr(inputs("language_modeling", CAUSAL, max_length=24), call)(long, 3)
    if call == "text":
        with pytest.raises(ValueError, match="row 4 has no tokens"):
            inputs().text({"text": " "}, 4)


def test_columns_are_those_asked_for_then_the_fit_s_then_the_usual():
    row = {"sentence": "a", "review": "b", "text_pair": "c", "label": 1}
    assert columns_of([row], Columns()) == Columns("sentence", "text_pair", None, "label")
    assert columns_of([row], Columns(text="review")).text == "review"
    known = Columns(text="review", label="stars")
    assert columns_of([row], Columns(), known) == Columns("review", None, None, "label")
    with pytest.raises(ValueError, match="no column 'stars'; the data have 'sentence', 'review'"):
        columns_of([row], Columns(label="stars"))


@pytest.mark.parametrize("names", [("question", "sentence"), ("sentence", "sentence2")])
def test_several_columns_of_texts_must_be_told_apart(names):
    row = {**dict.fromkeys(names, "a"), "answer": "b", "label": 0}
    with pytest.raises(ValueError, match=rf"several columns of texts, '{names[0]}', '{names[1]}'"):
        columns_of([row], Columns())
    assert columns_of([row], Columns(text=names[1])) == Columns(names[1], None, None, "label")
    both = columns_of([row], Columns(pair=names[1]))
    assert both == Columns(names[0], names[1], None, "label")
    assert columns_of([row], Columns(), Columns(text=names[0])).text == names[0]


def test_the_fit_s_second_text_is_neither_left_out_nor_asked_for_in_vain():
    row, known = {"body": "a", "second": "b"}, Columns(text="text", pair="text_pair")
    with pytest.raises(ValueError, match=r"'text_pair'; the data .* by --pair-field"):
        columns_of([row], Columns(text="body"), known)
    assert columns_of([row], Columns(text="body", pair="second"), known).pair == "second"
    named = {"text": "a", "second": "b"}
    assert columns_of([named], Columns(pair="second"), known) == Columns("text", "second")
    with pytest.raises(ValueError, match=r"'text'; the data .* by --text-field"):
        columns_of([row], Columns(pair="second"), known)


def test_a_column_is_there_if_any_row_has_it():
    row, full = {"text": "the film", "label": 0}, {"text": "a", "text_pair": "b", "completion": "c"}
    assert columns_of([row, full], Columns()) == replace(TEXT, completion=None)
    assert columns_of([row, full], Columns(), TEXT) == replace(TEXT, completion=None)
    assert columns_of([row, full], Columns(text="completion")).text == "completion"
    assert is_preference([{"prompt": "a"}, {"chosen": "b", "rejected": "c"}])
    first, second = ({**r, "label": 0} for r in ({"text": "the film"}, {**full, "text": "was"}))
    plain, paired = inputs().labelled([first, second])
    assert plain["input_ids"] == tokenizer()("the film")["input_ids"]
    assert paired["input_ids"] == tokenizer()("was", "b")["input_ids"]
    with pytest.raises(ValueError, match="row 2 has no label: its column 'label' is missing"):
        inputs().labelled([row, full])
    with pytest.raises(ValueError, match="row 1 has no completion: its column 'completion' is mis"):
        inputs("language_modeling", CAUSAL).scored(row, 1)


@pytest.mark.parametrize(
    ("names", "labels", "form", "expected"),
    [
        (["bad", "good"], [0, 1, "1"], None, ([0, 1, 1], "numbers")),
        ([" yes", " no"], ["no", " yes"], None, ([1, 0], "names")),
        (["1", "2"], [0, 1, 0], None, ([0, 1, 0], "numbers")),
        (["1", "2"], [1, 2, 1], None, ([0, 1, 0], "names")),
        (["1", "2", "3"], ["0", "1", "2"], None, ([0, 1, 2], "numbers")),
        (["1", "2", "3"], ["1", "2"], "names", ([0, 1], "names")),
        (["1", "2", "3"], ["1", "2"], "numbers", ([1, 2], "numbers")),
        (["0", "1", "x"], ["0", 1], None, ([0, 1], None)),
        (["bad", "good"], ["good", "bad"], "numbers", ([1, 0], "names")),
        (["bad", "good"], [1, 0], "names", ([1, 0], "numbers")),
        (["bad", "good"], [0.0, "1.0", 1], None, ([0, 1, 1], "numbers")),
        (["1.0", "2.0", "3.0"], [1.0, "2.0"], None, ([0, 1], "names")),
        (["0", "1"], [True, False, 1], None, ([1, 0, 1], None)),
        (["0", "1"], ["True", "false", " TRUE", 0], None, ([1, 0, 1, 0], None)),
        (["True", "False"], [True, False], None, ([0, 1], "names")),
        (["false", "true"], ["true", "false"], None, ([1, 0], "names")),
        (["false", "true"], [True, False, "True"], None, ([1, 0, 1], "names")),
        ([" TRUE", " FALSE", " maybe"], [True, "false", "maybe"], None, ([0, 1, 2], "names")),
        (["0", "1", "2"], ["LABEL_2", "LABEL_0"], None, ([2, 0], "names")),
        (["LABEL_1", "LABEL_0"], ["LABEL_0"], None, ([1], "names")),
    ],
)
def test_the_labels_of_a_file_are_all_names_or_all_numbers(names, labels, form, expected):
    assert classes_of(labels, names, form) == expected


@pytest.mark.parametrize(
    ("names", "labels", "form", "message"),
    [
        (["a", "b"], [0.0, 0.5], None, "row 2 has the label 0.5"),
        (["a", "b"], ["a", "-1"], None, "row 2 has the label '-1'"),
        (["a", "b"], [True], None, "row 1 has the label True; .*true and false are neither"),
        (["0", "1", "2"], [True], None, "row 1 has the label True; .*true and false are neither"),
        (["True", "true", "no"], [False], None, "the label False; .*from 0 to 2. --labels names"),
        (["a", "b"], ["True"], None, "row 1 has the label 'True'; .*true and false are neither"),
        (["a", "b"], ["LABEL_1"], None, "row 1 has the label 'LABEL_1'; expected one of 'a', 'b'"),
        (["a", "b"], ["a", 1], None, "row 1 has 'a', only a name, and row 2 has 1, only a number"),
        (["1", "2", "3"], [0, 3], None, "row 2 has 3, only a name, and row 1 has 0, only a number"),
        (["1", "2", "3"], [1, 2], None, "1 in row 1 is the name of class 0, and the number of '2'"),
        (["1", "2", "3"], [1, 0], "names", "row 2 has 0, which is none of the names"),
        (["1", "2", "3"], [1, 3], "numbers", "row 2 has 3, which is none of the numbers"),
        (["1", "2", "3"], [3, 3], "numbers", "row 1 has 3, which is none of the numbers"),
        (["1", "2", "3"], [0, 0], "names", "row 1 has 0, which is none of the names"),
        (["-1", "0", "1"], [-1, -1], "numbers", "row 1 has -1, which is none of the numbers"),
    ],
)
def test_labels_that_may_be_misread_are_refused(names, labels, form, message):
    with pytest.raises(ValueError, match=message):
        classes_of(labels, names, form)


def test_labels_that_do_not_exclude_each_other():
    assert applying(["b"], ["a", "b"], 1) == [0.0, 1.0] == applying([0, 1], ["a", "b"], 1)
    assert applying([], ["a", "b"], 1) == [0.0, 0.0]


@pytest.mark.parametrize("name", ["0", "1", "good"])
def test_a_single_label_may_stand_without_a_list(name):
    """It applies or not, whatever the class is called."""
    for label, expected in (
        (0, 0.0),
        (1, 1.0),
        (True, 1.0),
        ("0", 0.0),
        ("True", 1.0),
        ("false", 0.0),
        ("1 ", 1.0),
        (-100, -100.0),
    ):
        assert applying(label, [name], 1) == [expected]
    assert applying("good", ["good"], 1) == [1.0]
    assert applying("false", ["false"], 1) == [1.0]
    with pytest.raises(ValueError, match="row 3 has the label"):
        applying("bad", [name], 3)


@pytest.mark.parametrize("prompt", [False, True])
def test_a_pair_of_a_text_and_messages_is_refused(prompt):
    pairs = inputs("reward_modeling", chat=True, columns=Columns("text" if prompt else None))
    for row in ({"chosen": TURNS, "rejected": "bad"}, {"chosen": "bad", "rejected": TURNS}):
        with pytest.raises(ValueError, match=r"row 3: .*both"):
            pairs.preference({"text": "the film", **row}, 3)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pair_that_differs_only_in_what_is_cut_off_is_refused(side, eos):
    pairs = inputs("reward_modeling", columns=Columns(), max_length=4, eos=eos)
    pairs.adapter.tokenizer.truncation_side = side
    words = {"chosen": "good", "rejected": "bad"}
    behind = {half: f"the the the the {word}" for half, word in words.items()}
    before = {half: f"{word} the the the the" for half, word in words.items()}
    same, read = (behind, before) if side == "right" else (before, behind)
    with pytest.raises(ValueError, match=r"row 2: its .* only in what is cut off to leave 4 tok"):
        pairs.preferences([read, same])
    with pytest.raises(
        ValueError, match=r"^7 rows \(1, 3, 4, 5, 6, \.\.\.\): their .* raise --max"
    ):
        pairs.preferences([same, read, *[same] * 6])
    with pytest.raises(ValueError, match=r"^2 rows \(1, 3\): their"):
        pairs.preferences([same, read, same])
    (found,) = pairs.preferences([read])
    assert found["chosen"]["input_ids"] != found["rejected"]["input_ids"]
    assert pairs.preferences([dict.fromkeys(words, behind["chosen"])])  # as its writer has it


@pytest.mark.parametrize(
    ("limit", "places", "way"),
    [
        (4, 24, "or raise --max-length"),
        (4, None, "or raise --max-length"),
        (24, None, "or raise --max-length above what tokenizer and configuration say"),
        (30, 512, "or raise --max-length above what tokenizer and configuration say"),
        (24, 24, "leave [a-z]+ out: the model has positions for no more tokens"),
        (4, 4, "leave [a-z]+ out: the model has positions for no more tokens"),
    ],
)
def test_a_longer_input_is_advised_where_the_model_takes_it(limit, places, way):
    text, pair = "the " * limit, {"chosen": "the " * limit, "rejected": "the " * limit + "bad"}
    prompts = inputs(kind=CAUSAL, max_length=limit)
    pairs = inputs("reward_modeling", columns=Columns(), max_length=limit)
    prompts, pairs = (
        replace(x, adapter=replace(x.adapter, places=places)) for x in (prompts, pairs)
    )
    with pytest.raises(ValueError, match=f"row 3 has {limit + 1} tokens.* {way}$"):
        prompts.text({"text": text + "bad"}, 3)
    with pytest.raises(ValueError, match=f"row 1: .* {way}$"):
        pairs.preferences([pair])


@pytest.mark.parametrize("number", [10**400, [10**400, 1.0]])
def test_a_number_too_large_is_refused_with_its_row(number):
    with pytest.raises(ValueError, match=r"row 2 has the label .*; expected finite numbers"):
        numbers_of(number, 2, 2)


def test_numbers_with_underlines_are_none():
    with pytest.raises(ValueError, match="row 2 has the label '1_000', no number"):
        numbers_of("1_000", 2, 1)
    with pytest.raises(ValueError, match=r"row 2 has the label \['0_1'\]; expected"):
        applying("0_1", ["good"], 2)
    assert numbers_of(" 1000 ", 2, 1) == 1000.0


def test_lists_of_zeros_and_ones_as_texts_are_no_names():
    unnamed, named = ["0", "1", "2"], ["a", "b", "c"]
    for label in (["0", "1", "1"], ["1", "0", "0"]):
        with pytest.raises(ValueError, match=r"row 3 .* as LABEL_0 .* 0 or 1 for each without"):
            applying(label, unnamed, 3)
    assert applying(["0", "1"], unnamed, 3) == [1.0, 1.0, 0.0]
    assert applying(["0", "1", "2"], unnamed, 3) == [1.0, 1.0, 1.0]
    assert applying([0, 1, 1], unnamed, 3) == [0.0, 1.0, 1.0]
    assert applying(["LABEL_0", "LABEL_1"], ["0", "1"], 3) == [1.0, 1.0]
    assert applying(["LABEL_2", "1"], unnamed, 3) == [0.0, 1.0, 1.0]
    for label, names in ((["LABEL_3"], unnamed), (["LABEL_0"], named), (["LABEL_0"], ["0"])):
        with pytest.raises(ValueError, match=r"row 3 has the label .* expected"):
            applying(label, names, 3)
    for names, twice in (
        (named, ["a", "b", "a"]),
        (unnamed, ["2", "LABEL_2"]),
        (named, ["c", "c"]),
    ):
        with pytest.raises(ValueError, match=r"row 3 .* names a class twice"):
            applying(twice, names, 3)
