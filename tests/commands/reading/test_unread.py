"""Which columns are read is said, and none that looks like a second text is left out unasked."""

import pytest

from laplace_lora.commands.reading.adapter import CAUSAL, HEAD, Adapter
from laplace_lora.commands.reading.planning import plan_again, plan_fit
from laplace_lora.commands.reading.said import columns_said, prompts_said
from support.on_disk import tokenizer

META = {"id": "row-1", "source": "a site", "notes": "see the film", "idx": 3, "n2": "0.5"}


def planned(row, kind=HEAD, outputs=2, **options):
    return plan_fit(Adapter(None, tokenizer(), kind, outputs, [], None, 24), [row], options)


@pytest.mark.parametrize(
    "name", ["answer", "response", "completion", "text_b", "text-b", "question2", "sentence_2"]
)
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_second_text_is_not_left_out_unasked(name, outputs):
    row = {"text": "the film", name: "the meal", "label": 1.0 if outputs == 1 else 1}
    with pytest.raises(ValueError, match=f"--text-field text --pair-field {name} for pairs"):
        planned(row, outputs=outputs)
    assert planned(row, outputs=outputs, text_field="text").columns.pair is None
    assert planned(row, outputs=outputs, pair_field=name).columns.pair == name


def test_other_columns_are_left_out():
    row = {"text": "the film", **META, "label": 1, "label2": "kind", "id_b": "row-2"}
    assert planned(row).columns.pair is None
    for name, value in {
        "text_b": "https://example.org/a",
        "uid_2": "ab-12",
        "title2": "The Meal",
        "source_b": "wiki",
        "answer": "nan",
    }.items():
        assert planned({"text": "the film", name: value, "label": 1}).columns.pair is None
    partners = {"text": "the film", "part_a": "the film", "part_b": "the meal", "label": 1}
    with pytest.raises(ValueError, match="'part_b' may hold a second text"):
        planned(partners)
    numbers = {"text": "the film", "answer": 3, "response": "0.25", "label": 1}
    assert planned(numbers).columns.pair is None
    known = {"text": "the film", "text_pair": "the meal", "answer": "yes", "label": 1}
    assert planned(known).columns.pair == "text_pair"
    asked = {"prompt": "the film", "answer": "yes", "label": "good"}
    assert planned(asked, CAUSAL, targets=["bad", "good"]).columns.text == "prompt"
    rewarded = {"prompt": "the film", "answer": "yes", "label": 1}
    options = {"likelihood": "reward_modeling"}
    assert planned(rewarded, outputs=1, **options).columns.completion == "answer"


@pytest.mark.parametrize(
    ("row", "kind", "outputs", "options", "said"),
    [
        ({"text": "a", "label": 1}, HEAD, 2, {}, "Reads 'text' and label 'label'."),
        (
            {"question": "a", "answer": "b", "label": 1},
            HEAD,
            2,
            {"text_field": "question"},
            "Reads 'question' and label 'label'; 'answer' is not read.",
        ),
        (
            {"id": 1, "text": "a", "text_pair": "b", "label": 1, "source": "c"},
            HEAD,
            2,
            {},
            "Reads 'text' and 'text_pair' and label 'label'; 'id', 'source' are not read.",
        ),
        (
            {"chosen": "a", "rejected": "b", "label": 1},
            HEAD,
            1,
            {},
            "Reads 'chosen' and 'rejected'; 'label' is not read.",
        ),
        (
            {"prompt": "a", "response": "b", "label": 1},
            CAUSAL,
            0,
            {},
            "Reads 'prompt' and 'response'; 'label' is not read.",
        ),
        (
            {"text": "a", **{f"n{i}": i for i in range(3, 13)}, "label": 1},
            HEAD,
            2,
            {},
            "Reads 'text' and label 'label'; 'n3', 'n4', 'n5', 'n6', 'n7', 'n8', 'n9', 'n10' and "
            "2 more are not read.",
        ),
    ],
)
def test_columns_are_named(row, kind, outputs, options, said):
    assert columns_said(planned(row, kind, outputs, **options), [row]) == said


def test_earlier_answers_of_conversations_are_said_to_be_context():
    turn, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [turn, answer] * n} for n in (1, 2, 3)]
    said = "Reads 'messages'. In 2 of 3 conversations the assistant answers several times: the last"
    assert columns_said(planned(rows[0], CAUSAL), rows).startswith(said)
    assert columns_said(planned(rows[0], CAUSAL), rows[:1]) == "Reads 'messages'."
    completed = {"prompt": rows[1]["messages"], "completion": [answer]}  # is scored, not the prompt
    plan = planned(completed, CAUSAL)
    assert columns_said(plan, [completed]) == "Reads 'prompt' and 'completion'."


def test_answers_without_the_prompts_beside_them_are_refused():
    """Pairs whose prompts the fit read within the conversations."""

    def said(*contents):
        roles = ("user", "assistant")[-len(contents) :]
        return [{"role": r, "content": x} for r, x in zip(roles, contents, strict=True)]

    adapter = Adapter(None, tokenizer(chat=True), HEAD, 1, [], None, 24)
    whole = {"chosen": said("the film", "good"), "rejected": said("the film", "bad")}
    plan = plan_fit(adapter, [whole], {})
    answers = {"chosen": said("good"), "rejected": said("bad")}
    beside = [{"prompt": said("the film", "was")[:1], **answers}]
    again = plan_again(adapter, plan, beside, {})
    with pytest.raises(ValueError, match=r"row 1: .* 'chosen' begin with an answer, and 'prompt' "):
        prompts_said(again, beside)
    assert prompts_said(plan_again(adapter, plan, beside, {"text_field": "prompt"}), beside) is None
    assert prompts_said(again, [answers]) is None
    assert "--text-field prompt reads it" in prompts_said(again, [{"prompt": "the film", **whole}])
