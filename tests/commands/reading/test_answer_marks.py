"""What is scored of an answer beyond a template's marks is said, and only that."""

import pytest

from laplace_lora.commands.reading.adapter import CAUSAL, Adapter
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.planning import plan_fit
from laplace_lora.commands.reading.said import marks_said
from support.command_line import run
from support.on_disk import tokenizer, write_json_lines

ASKED = {"role": "user", "content": "the film"}
ROW = {"messages": [ASKED, {"role": "assistant", "content": "was good"}]}
PAIRED = {"prompt": "the film", "completion": "was good"}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{%- generation %}{{ m['content'] }} [EOS]BEFORE{% endgeneration %} BEHIND "
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def marked(before="", behind="", template=TEMPLATE):
    words = tokenizer()
    words.chat_template = template.replace("BEFORE", before).replace("BEHIND", behind)
    return words


def said(row, words, **options):
    adapter = Adapter(None, words, CAUSAL, 0, [], None, 24)
    return marks_said(Inputs(adapter, plan_fit(adapter, [row], options)), [row])


@pytest.mark.parametrize("row", [ROW, PAIRED])
def test_what_is_scored_behind_the_mark_is_shown(row):
    sentence = said(row, marked(behind="the meal"))
    assert sentence.startswith("Of an answer 'the meal' is scored as well, which stands outside")
    assert said(row, marked(before=" the meal")) is None


def test_without_marks_and_without_a_conversation_there_is_nothing_to_say():
    bare = TEMPLATE.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
    assert said(ROW, marked(behind="the meal", template=bare)) is None
    assert said(PAIRED, marked(behind="the meal"), chat=False) is None


def test_fit_and_doctor_say_so(adapter, tmp_path):
    folder = adapter("chat")
    marked(behind="the meal").save_pretrained(folder)
    path = write_json_lines(tmp_path / "x.jsonl", [ROW] * 4)
    for command in ("doctor", "fit"):
        result = run(command, folder, "--data", path)
        assert "'the meal' is scored as well" in " ".join(result.output.split())
