"""Messages are taken as chat templates take them; those that would be misread are refused."""

import pytest

from laplace_lora.commands.reading.adapter import CAUSAL, HEAD, Adapter
from laplace_lora.commands.reading.answers import answer_tokens
from laplace_lora.commands.reading.columns import Columns
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import Plan
from support.texts import byte_tokenizer

ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yo"}
END = "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
AS_JSON = (  # as Llama 3.1's and others' for tools
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif 'content' in m and m['content'] is not none %}{{ m['content'] | tojson }}{% endif %}"
    + END
)
JOINED = "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] }}" + END  # ChatML's
WRITTEN = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}" + END
OF_TEXTS = (
    "{% for m in messages %}<{{ m['role'][0] }}>{% for p in m['content'] if p['type'] == 'text' %}"
    "{{ p['text'] }}{% endfor %}" + END
)


def inputs(template, likelihood="language_modeling", kind=CAUSAL, **plan):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = template, "Ċ"
    made = Adapter(None, tokenizer, kind, 0, [], None, None)
    return Inputs(made, Plan(likelihood, Columns("messages"), ["y", "n"], chat=True, **plan))


def read(model, *messages, call="text"):
    found = getattr(model, call)({"messages": list(messages)}, 3)
    return model.adapter.tokenizer.decode(found["input_ids"])


@pytest.mark.parametrize("role", ["assistant", "Assistant", "model", "gpt", "bot"])
def test_an_answer_is_one_under_whatever_name(role):
    model = inputs(AS_JSON)
    with pytest.raises(ValueError, match=rf"row 3: the last message .* is the {role}'s, .* asked"):
        read(model, ASK, {**SAY, "role": role})
    assert read(model, ASK, {**SAY, "role": role}, ASK).endswith("yo<u>hi<a>")


@pytest.mark.parametrize("role", ["user", "Human", "system", "developer", "tool", "ipython"])
def test_those_who_ask_may_be_the_last(role):
    assert read(inputs(AS_JSON), ASK, {**ASK, "role": role}) == f"<u>hi<{role[0]}>hi<a>"


@pytest.mark.parametrize("role", ["tool", "ipython", "function"])
@pytest.mark.parametrize(
    ("content", "written"),
    [({"t": 22}, '{"t": 22}'), ([21, "a"], '[21, "a"]'), (22, "22"), ([], "[]"), ("22", "22")],
)
def test_what_a_tool_has_found_may_be_of_any_form(role, content, written):
    result = {"role": role, "content": content}
    scored = read(inputs(AS_JSON), ASK, SAY, result, SAY, call="scored")
    assert scored == f"<u>hi<a>yo<{role[0]}>{written}<a>yo"
    assert read(inputs(WRITTEN), ASK, result) == f"<u>hi<{role[0]}>{content}<a>"
    for nothing in ({"role": role}, {"role": role, "content": None}):
        with pytest.raises(ValueError, match="row 3: message 2 in its column 'messages' has"):
            read(inputs(AS_JSON), ASK, nothing)


@pytest.mark.parametrize("content", [["hi"], [{"type": "text", "text": "hi"}]])
def test_parts_that_are_written_as_they_stand_are_refused(content):
    with pytest.raises(ValueError, match=r"row 3: .* \(it writes a content of several parts"):
        read(inputs(WRITTEN), {"role": "user", "content": content})
    with pytest.raises(ValueError, match=r"row 3: the chat template does not .* concatenate str"):
        read(inputs(JOINED), {"role": "user", "content": content})


BY_TYPE = (  # as Gemma's and other models' that see
    "{% for m in messages %}<{{ m['role'][0] }}>{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<img>"
    "{% elif p['type'] == 'text' %}{{ p['text'].split('</think>')[-1] | trim }}{% endif %}"
    "{% endfor %}{% endif %}" + END
)
ONLY_STRINGS = (
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{% if m['content'] is string %}{{ m['content'] }}{% endif %}" + END
)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "content": "hi"},
        {"type": "text", "text": None},
        {"type": None, "image": "cat.png", "text": None},
        {"image": "cat.png"},
        3,
    ],
)
def test_parts_without_a_text_are_refused(part):
    content = [{"type": "text", "text": "hi"}, part]
    with pytest.raises(ValueError, match=r"row 3: message 1 .* has a part without a text, .*read"):
        read(inputs(BY_TYPE), {"role": "user", "content": content})


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (BY_TYPE, ["hi"]),
        (BY_TYPE, [{"text": "hi"}]),
        (BY_TYPE, [{"type": "text", "text": "hi"}, {"text": "u"}]),  # which stands there as a role
        (ONLY_STRINGS, [{"type": "text", "text": "hi"}]),
        (OF_TEXTS, "hi"),
    ],
)
@pytest.mark.parametrize("call", ["text", "scored"])
def test_what_a_template_leaves_out_is_refused(template, content, call):
    ask = {"role": "user", "content": content}
    with pytest.raises(ValueError, match=r"row 3: .* \(it leaves out what message 1 says\)"):
        read(inputs(template), ask, *([SAY] if call == "scored" else []), call=call)


def test_what_a_template_changes_is_not_left_out():
    said = [{"type": "text", "text": "<think>a question</think> yo "}]
    ask = {"role": "user", "content": [{"type": "text", "text": " hi "}, {**said[0], "text": " "}]}
    assert read(inputs(BY_TYPE), ask, {**SAY, "content": said}, ask) == "<u>hi<a>yo<u>hi<a>"
    call = {**SAY, "content": said, "tool_calls": [{"name": "look"}]}  # as Llama 3.1's leaves it
    assert read(inputs(ONLY_STRINGS), ASK, call, ASK) == "<u>hi<a><u>hi<a>"


@pytest.mark.parametrize("content", [{"t": "warm"}, {"t": [22]}, ["warm", 22], [{"text": "a"}]])
def test_what_a_tool_has_found_is_written_or_refused(content):
    result = {"role": "tool", "content": content}
    assert str(content) in read(inputs(WRITTEN), ASK, result)
    for template in (BY_TYPE, ONLY_STRINGS):
        with pytest.raises(ValueError, match=r"row 3: .* \(it leaves out what message 2 says\)"):
            read(inputs(template), ASK, result)
    for written in ("warm", [], [{"type": "text", "text": "warm"}]):
        assert read(inputs(BY_TYPE), ASK, {**result, "content": written})
    by_name = JOINED.replace("m['content']", "(m['content']['t'] or m['content'])")
    assert read(inputs(by_name), ASK, {**result, "content": {"t": "warm"}}) == "<u>hi<t>warm<a>"


FEW_ROLES = (  # as Qwen 2.5's and others'
    "{% if messages[0]['role'] == 'system' %}<s>{{ messages[0]['content'] }}{% endif %}"
    "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}"
    "<{{ m['role'][0] }}>{{ m['content'] }}{% endif %}" + END
)


@pytest.mark.parametrize(
    "role", ["human", "Human", "developer", "system", "tool", "function", "ipython", "observation"]
)
@pytest.mark.parametrize("content", ["hi", '{"t": 22}', '{"t": true}', "22"])
def test_roles_that_a_template_passes_over_are_refused(role, content):
    other = {"role": role, "content": content}
    for call, answer in (("text", []), ("scored", [SAY])):
        with pytest.raises(ValueError, match=r"row 3: .* \(it leaves out what message 3 says\)"):
            read(inputs(FEW_ROLES), ASK, SAY, other, *answer, call=call)
        whole = [ASK, SAY, other, *answer]
        assert read(inputs(WRITTEN), *whole, call=call).count(f"<{role[0]}>{content}<a>") == 1
        empty = {**other, "content": ""}
        assert read(inputs(FEW_ROLES), ASK, SAY, empty, *answer, call=call)


def test_a_developer_s_message_that_a_template_passes_over_is_refused():
    guide = {"role": "developer", "content": "say no"}
    with pytest.raises(ValueError, match=r"row 3: .* \(it leaves out what message 1 says\)"):
        read(inputs(FEW_ROLES), guide, ASK)
    assert read(inputs(FEW_ROLES), {**guide, "role": "system"}, ASK) == "<s>say no<u>hi<a>"
    switch = {"role": "control", "content": "thinking"}  # as Granite's, which is not written
    assert read(inputs(FEW_ROLES), switch, ASK) == "<u>hi<a>"


def test_an_answer_that_a_template_passes_over_is_refused_of_a_head():
    model = inputs(FEW_ROLES, "classification", HEAD)
    assert read(model, ASK, SAY) == "<u>hi<a>yo"
    with pytest.raises(ValueError, match=r"row 3: .* \(it leaves out what message 2 says\)"):
        read(model, ASK, {**SAY, "role": "gpt"})
    with pytest.raises(ValueError, match=r"row 3: .* \(it leaves out what message 1 says\)"):
        read(model, {**ASK, "role": "human"}, SAY)


def test_what_a_template_takes_out_of_a_result_s_json_is_written():
    by_key = WRITTEN.replace("m['content'] }}", "m['content'].split('\"t\": ')[-1] }}")
    result = {"role": "tool", "content": '{"u": 1, "t": 22}'}
    assert read(inputs(by_key), ASK, result) == "<u>hi<t>22}<a>"


@pytest.mark.parametrize(
    "said",
    [
        {"content": "  "},
        {"content": None, "reasoning_content": "so"},
        {"content": "", "reasoning_content": "so"},
        {"content": None, "tool_calls": [{"name": "look"}]},
        {"content": [{"type": "text", "text": ""}]},
    ],
)
def test_answers_of_which_nothing_is_written_are_refused(said):
    """Or what ends all answers alike would be scored alone."""
    ended = BY_TYPE.replace(
        "{% endfor %}{% if add",
        "{% if m['role'] == 'assistant' %}#{% endif %}{% endfor %}{% if add",
    )
    ended = ended.replace("{{ m['content'] }}", "{{ m['content'] | trim }}").replace(
        "in m['content'] %}", "in m['content'] or [] %}"
    )
    model = inputs(ended)
    assert read(model, ASK, SAY, call="scored") == "<u>hi<a>yo#"
    with pytest.raises(ValueError, match=r"row 3: .* \(it writes nothing of the assistant's ans"):
        read(model, ASK, {**SAY, **said}, call="scored")
    calls = "#{{ m['tool_calls'] or m['reasoning_content'] }}"
    model = inputs(ended.replace("#", calls))
    if len(said) > 1:
        assert "o" in read(model, ASK, {**SAY, **said}, call="scored").partition("#")[2]
    strict = "{% if messages[-1]['content'] == '' %}{{ raise_exception('none') }}{% endif %}"
    assert read(inputs(strict + ended), ASK, SAY, call="scored") == "<u>hi<a>yo#"


@pytest.mark.parametrize("name", ["tool_calls", "function_call", "reasoning_content"])
def test_what_stands_for_a_content(name):
    call = {"role": "assistant", "content": None, name: [{"name": "look"}]}
    assert read(inputs(AS_JSON), ASK, call, SAY, call="scored") == "<u>hi<a><a>yo"
    with pytest.raises(ValueError, match="row 3: message 2 in its column 'messages' has null"):
        read(inputs(AS_JSON), ASK, {**call, name: None}, SAY, call="scored")


@pytest.mark.parametrize("kind", ["image", "image_url", "audio"])
def test_pictures_are_refused_rather_than_left_out(kind):
    text = {"type": "text", "text": "what is it?"}
    pictured = {"role": "user", "content": [{"type": kind, "url": "cat.png"}, text]}
    for call, messages in (("text", [pictured]), ("scored", [pictured, SAY])):
        with pytest.raises(
            ValueError, match=rf"row 3: message 1 .* '{kind}'; only parts of the type 'text' are"
        ):
            read(inputs(OF_TEXTS), *messages, call=call)
    assert read(inputs(OF_TEXTS), {**pictured, "content": [text]}) == "<u>what is it?<a>"
    every = inputs(OF_TEXTS.replace(" if p['type'] == 'text'", ""))
    assert read(every, {**pictured, "content": [{**text, "type": None}]}) == "<u>what is it?<a>"


def test_a_template_that_joins_no_answer_to_a_prompt_is_named():
    """As where it joins each message to a number, but only behind an answer."""
    model = inputs(
        JOINED.replace(
            "m['content'] }}", "m['content'] + (1 if m['role'] == 'assistant' else '') }}"
        ),
        "classification",
        targets=True,
    )
    with pytest.raises(
        ValueError, match=r"row 1: the chat template takes no answer .* concatenate"
    ):
        answer_tokens(model.adapter, model.plan, [{"messages": [ASK]}])
