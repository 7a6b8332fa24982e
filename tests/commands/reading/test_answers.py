"""Answers are the tokens that follow the prompts; others that may be meant are pointed out."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from laplace_lora.commands.reading.adapter import CAUSAL, SEQ2SEQ, Adapter
from laplace_lora.commands.reading.answers import answer_tokens, target_tokens
from laplace_lora.commands.reading.columns import Columns
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.planning import plan_fit
from laplace_lora.commands.reading.prompt_ends import rows_by_end
from laplace_lora.commands.training_warnings import warn_if_other_tokens, warn_if_spaces_meet
from support.on_disk import tokenizer
from support.texts import byte_tokenizer, stripping_tokenizer

ROWS = [{"text": "ab: "}, {"text": "ab:"}, {"text": [{"role": "user", "content": "ab "}]}]
WORDS = ("is", "it", "A", ":", "(", "<u>", "<a>", "yes", "no", "ityes", "itno")
MERGES = [("y", "e"), ("ye", "s"), ("n", "o"), ("Ġ", "yes"), ("Ġ", "no")]
CHAT = (
    "{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }}\n{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<a>\n{% endif %}"
)


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


def adapter(kind, template=None):
    made = {"sentencepiece": lambda: stripping_tokenizer(WORDS), "bytes": _bytes}[kind]()
    made.chat_template = template
    return Adapter(None, made, CAUSAL, 0, [], None, None)


def _bytes():
    return byte_tokenizer(MERGES)


def spaced_only():
    """A SentencePiece vocabulary in which "no" and "maybe" are words only behind a space."""
    made = stripping_tokenizer(("it", ":", "yes", "▁no", "▁maybe"))
    return Adapter(None, made, CAUSAL, 0, [], None, None)


def plan(*names, chat=False):
    return Plan("classification", Columns("text"), list(names), targets=True, chat=chat)


def found(model, plan, *texts):
    ids = answer_tokens(model, plan, [{"text": text} for text in texts])
    return model.tokenizer.convert_ids_to_tokens(ids)


def said(capsys, model, plan, *texts):
    warn_if_other_tokens(model, plan, [{"text": text} for text in texts])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "prompt", "names", "tokens"),
    [
        ("sentencepiece", "is it\n", ["no", "yes"], ["no", "yes"]),
        ("sentencepiece", "is it (", ["no", "yes"], ["no", "yes"]),
        ("sentencepiece", "A:", [" no", " yes"], ["▁no", "▁yes"]),
        ("sentencepiece", "is it", ["no", "yes"], ["▁no", "▁yes"]),  # or they run together
        ("bytes", "A:\n", ["no", "yes"], ["no", "yes"]),
        ("bytes", "A:", [" no", " yes"], ["Ġno", "Ġyes"]),
        ("bytes", "A: ", [" no", " yes"], ["Ġno", "Ġyes"]),  # which another warning is about
    ],
)
def test_answers_are_the_tokens_of_the_text_that_they_complete(kind, prompt, names, tokens):
    model = adapter(kind)
    assert found(model, plan(*names), prompt) == tokens
    for name, token in zip(names, tokens, strict=True):
        joined = prompt + ("" if prompt != "is it" else " ") + name
        expected = [*model.tokenizer(prompt)["input_ids"]]
        expected += model.tokenizer.convert_tokens_to_ids([token])
        assert model.tokenizer(joined)["input_ids"] == expected


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_behind_a_chat_template_answers_are_tokens_of_the_assistant_s_message(kind):
    model = adapter(kind, CHAT)
    texts = "is it", [{"role": "user", "content": "it"}]
    assert found(model, plan("no", "yes", chat=True), *texts) == ["no", "yes"]
    trimming = adapter(kind, CHAT.replace("m['content']", "m['content'] | trim"))
    assert found(trimming, plan(" no", " yes", chat=True), *texts) == ["no", "yes"]
    asked = {"targets": ["no", "yes"], "labels_as": "names"}
    fit = plan_fit(model, [{"text": "is it", "label": "yes"}], asked)
    assert fit.chat and fit.names == ["no", "yes"] and fit.labels_as == "names"


def test_second_texts_precede_the_answer():
    model = adapter("sentencepiece")
    pairs = Plan("classification", Columns("text", "pair"), ["no", "yes"], targets=True)
    ids = answer_tokens(model, pairs, [{"text": "is", "pair": "it\n"}])
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["no", "yes"]


@pytest.mark.parametrize(
    ("kind", "texts", "names", "message"),
    [
        ("bytes", ["A: "], ["no", "yes"], r"'no' alone, .* in \['A', ':', 'Ġ'\], .*'Ġno'\]. If"),
        ("bytes", ["A:"], ["no!", "yes!"], r"'no!' is 2 tokens of this tokenizer, \['no', '!'\]"),
        (
            "sentencepiece",
            ["is\n", "it"],
            ["no", "yes"],
            'row 2 .*itno.* it: --target " no" " yes"',
        ),
        ("bytes", ["A:"], ["no", "no"], "two answers are the same token"),
        ("bytes", ["A:"], ["no"], "needs two answers or more"),
    ],
)
def test_what_follows_no_prompt_as_one_token_is_refused(kind, texts, names, message):
    with pytest.raises(ValueError, match=message):
        found(adapter(kind), plan(*names), *texts)


def test_every_way_in_which_prompts_end_is_looked_at():
    """Not only rows in equal steps, which may all end alike."""
    model, count = adapter("bytes"), 48
    assert found(model, plan("no", "yes"), *["A:"] * count) == ["no", "yes"]
    for odd in range(count):
        texts = ["A:"] * count
        texts[odd] = "A: "
        with pytest.raises(ValueError, match=f"the prompt of row {odd + 1} by no single token"):
            found(model, plan("no", "yes"), *texts)


def test_rows_are_looked_at_by_the_last_token_of_their_prompts():
    model = adapter("bytes", CHAT)
    inputs = Inputs(model, plan("no", "yes"))
    texts = ["A:"] * 40
    texts[10], texts[21], texts[25] = "A:\n", "it", [{"role": "user", "content": "A:"}]
    rows = [{"text": text} for text in texts]
    steps = [1, 6, 11, 16, 21, 26, 31, 36]
    assert rows_by_end(inputs, rows) == sorted({*steps, 11, 22, 26})
    assert rows_by_end(Inputs(model, plan("no", "yes", chat=True)), rows) == steps
    pairs = Inputs(model, Plan("classification", Columns("text", "pair"), ["a"], targets=True))
    second = [{"text": "A:", "pair": text if isinstance(text, str) else None} for text in texts]
    assert rows_by_end(pairs, second) == sorted({*steps, 11, 22})
    many = [{"text": f"A{chr(0x100 + i)}"} for i in range(400)]
    assert len(rows_by_end(inputs, many)) <= 128 + 8


def test_roles_behind_which_a_template_ends_otherwise_are_all_looked_at():
    """As where a mark in place of the line break precedes the answer to a tool's result."""
    model, ask = byte_tokenizer([*MERGES, ("t", "yes"), ("t", "no")]), ROWS[2]["text"][0]
    end = "{{ 't' if messages[i]['role'] == 'tool' else '\n' }}"
    model.chat_template = CHAT.replace("<a>\n", f"<a>{end.replace('[i]', '[-1]')}").replace(
        "'<a>' }}\n", "'<a>' }}" + end.replace("[i]", "[loop.index0 - 1]")
    )
    adapter, count = Adapter(None, model, CAUSAL, 0, [], None, None), 48
    assert found(adapter, plan("no", "yes", chat=True), "is it", [ask]) == ["no", "yes"]
    for chat, texts in ((False, [[ask]] * count), (True, ["is it"] * count)):
        texts[10] = [ask, {"role": "tool", "content": "22"}]
        with pytest.raises(ValueError, match=r"the prompt of row 11 by no single token"):
            found(adapter, plan("no", "yes", chat=chat), *texts)


def test_a_space_that_a_tokenizer_puts_before_texts_hides_no_end():
    """As Llama 2's first conversions do, whose spaces merge."""
    pieces = ["<unk>", "▁", *"isab(", "<0x0A>", "▁▁", "▁(", "(a", "(b"]
    merges = [("▁", "▁"), ("▁", "("), ("(", "a"), ("(", "b")]
    words = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(words, merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    adapter, texts = Adapter(None, made, CAUSAL, 0, [], None, None), ["is ("] * 48
    texts[10] = "is\n("
    read = {text: made(text)["input_ids"] for text in ("is (", "is (a", "is\n(", "is\n(a")}
    assert read["is (a"] == [
        *read["is ("],
        words["a"],
    ]  # and with the other end it is another token
    assert read["is\n(a"] == [*read["is\n("][:-1], words["(a"]]
    assert 11 in rows_by_end(Inputs(adapter, plan("a", "b")), [{"text": text} for text in texts])


def test_a_prompt_that_ends_in_half_a_character_is_named():
    texts = ["A:"] * 20
    texts[0] = "A: \ud83d"
    with pytest.raises(ValueError, match="row 1: its column 'text' holds half of a character"):
        found(adapter("bytes"), plan("no", "yes"), *texts)
    inputs = Inputs(adapter("bytes"), plan("no", "yes"))
    assert rows_by_end(inputs, [{"text": "A: \ud83d"}])  # where it is not what is looked at


def test_words_at_the_ends_of_prompts_are_tokenized_once(monkeypatch):
    model, seen = adapter("bytes"), []
    inputs, texts = Inputs(model, plan("no", "yes")), [f"{i} is it" for i in range(999)]
    read = type(model.tokenizer).__call__
    monkeypatch.setattr(
        type(model.tokenizer), "__call__", lambda self, x, **k: seen.append(x) or read(self, x, **k)
    )
    rows_by_end(inputs, [{"text": text} for text in [*texts, "a  ", "is it\n\n", "it"]])
    assert seen == [["a  ", "it", "s it", "s it\n\n"]]


def test_a_space_is_taken_for_granted_before_every_answer_or_before_none():
    model = spaced_only()  # which reads "it:no" letter by letter, and "it:yes" not
    assert found(model, plan("yes", "no"), "it:") == ["▁yes", "▁no"]
    assert found(adapter("sentencepiece"), plan("yes", "no"), "it:", "it") == ["▁yes", "▁no"]


@pytest.mark.parametrize("names", [("yes", "no"), ("no", "maybe")])
def test_behind_a_line_break_no_space_is_taken_for_granted(names):
    model, spaced = spaced_only(), [f" {name}" for name in names]
    advice = f'begin the answers, .*: --target "{spaced[0]}" "{spaced[1]}"'
    with pytest.raises(ValueError, match=f"'no' .* by no single token.* {advice}"):
        found(model, plan(*names), "it:\n")
    assert found(model, plan(*spaced), "it:\n") == [f"▁{name}" for name in names]


def test_prompts_that_answers_follow_as_different_tokens_are_refused():
    model = adapter("sentencepiece")
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<e>"]})
    spacing = pre_tokenizers.Metaspace(prepend_scheme="always")  # behind special tokens, too
    model.tokenizer.backend_tokenizer.pre_tokenizer = spacing
    advice = 'end all prompts alike, or begin the answers with a space: --target " no" " yes"'
    with pytest.raises(ValueError, match=f"'no' behind .* row 1, and '▁no' .* row 2; {advice}$"):
        found(model, plan("no", "yes"), "is\n", "is<e>")
    assert found(model, plan(" no", " yes"), "is\n", "is<e>") == ["▁no", "▁yes"]


@pytest.mark.parametrize(("kind", "space"), [("bytes", "Ġ"), ("sentencepiece", "▁")])
def test_a_space_that_a_template_writes_may_begin_the_answers(kind, space, capsys):
    model = adapter(kind, CHAT.replace("\n{{ m['content'] }}", "\n{{ ' ' + m['content'] }}"))
    for names in (" no", " yes"), ("no", "yes"):
        assert found(model, plan(*names, chat=True), "is it") == [f"{space}no", f"{space}yes"]
    assert not said(capsys, model, plan(" no", " yes", chat=True), "is it")


def test_messages_behind_which_a_template_takes_no_answer_are_refused():
    silent = (
        "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('Users ask') }}{% endif %}"
    )
    model = adapter("bytes", silent + CHAT)
    with pytest.raises(
        ValueError, match=r"row 1: .* takes no answer .* \(Users ask\); .* --no-chat"
    ):
        found(model, plan("no", "yes"), [{"role": "user", "content": "is it"}])


def test_what_a_template_writes_before_an_answer_is_no_answer():
    model = adapter("bytes", CHAT.replace("\n{{ m['content'] }}", "\n*{{ m['content'] }}"))
    with pytest.raises(ValueError, match=r"becomes \[.*'\*', 'no'.*\. The chat .* --no-chat"):
        found(model, plan("no", "yes", chat=True), "is it")
    model = adapter("bytes", CHAT)
    with pytest.raises(ValueError, match=r"'no!' is 2 tokens"):  # not what they have in common
        found(model, plan("no!", "yes!", chat=True), "is it")


def test_without_prompts_before_them_answers_are_tokens_alone():
    model = adapter("sentencepiece")
    alone = target_tokens(["no", "yes"], model.tokenizer)
    assert answer_tokens(model, plan("no", "yes"), None) == alone
    encoder_decoder = Adapter(None, model.tokenizer, SEQ2SEQ, 0, [], None, None)
    assert answer_tokens(encoder_decoder, plan("no", "yes"), [{"text": "is it\n"}]) == alone
    warn_if_other_tokens(encoder_decoder, plan("no", "yes"), [{"text": "is it\n"}])


def test_tokens_that_differ_alone_are_pointed_out(capsys):
    model = adapter("sentencepiece", CHAT)
    names = plan("no", "yes", chat=True)
    warning = said(capsys, model, names, "is it")
    ids = model.tokenizer.convert_tokens_to_ids(["no", "yes", "▁no", "▁yes"])
    no, yes, alone_no, alone_yes = ids
    assert f"\"no\" \"yes\" means the tokens 'no' ({no}), 'yes' ({yes}), which" in warning
    assert f"alone it would be the tokens '▁no' ({alone_no}), '▁yes' ({alone_yes})" in warning
    assert warning.rstrip().endswith('say --target " no" " yes"')
    assert found(model, plan(" no", " yes", chat=True), "is it") == ["▁no", "▁yes"]
    trimming = adapter("sentencepiece", CHAT.replace("m['content']", "m['content'] | trim"))
    assert "give their numbers from Python" in said(capsys, trimming, names, "is it")
    assert not said(capsys, adapter("bytes", CHAT), names, "is it")
    assert not said(capsys, adapter("sentencepiece"), plan(" no", " yes"), "A:")


def test_several_tokens_alone_are_no_other_way_to_answer(capsys):
    model = adapter("sentencepiece")  # and as Llama 2's first conversions: "▁", "▁no" alone
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    assert model.tokenizer.tokenize(" no") == ["▁", "▁no"]
    assert found(model, plan(" no", " yes"), "A:") == ["▁no", "▁yes"]
    assert not said(capsys, model, plan(" no", " yes"), "A:")


def test_spaces_before_an_assistant_s_answer_are_pointed_out(capsys):
    names = plan(" no", " yes", chat=True)
    warning = said(capsys, adapter("bytes", CHAT), names, "is it")
    assert 'say --target "no" "yes", which means the tokens \'no\' (' in warning
    assert not said(capsys, adapter("bytes"), plan(" no", " yes"), "A:")


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
