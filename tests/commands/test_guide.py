"""The commands in the guide run, in their order, in the folder that it describes."""

import re
import shlex
import subprocess
from pathlib import Path

from support.command_line import run
from support.on_disk import reviews, save_classifier, save_decoder, write_json_lines

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "command-line.md"


def commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_the_guide_s_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    makers = {"adapter": save_classifier, "decoder": save_decoder, "writer": save_decoder}
    for name, make in makers.items():
        (tmp_path / f"{name}-files").mkdir()
        make(tmp_path / f"{name}-files").rename(tmp_path / f"my-{name}")
    for seed, name in enumerate(("train", "val", "test", "new")):
        write_json_lines(tmp_path / f"{name}.jsonl", reviews(32, seed))
    answers = [{"prompt": r["text"], "label": ("bad", "good")[r["label"]]} for r in reviews(32, 0)]
    write_json_lines(tmp_path / "questions.jsonl", answers)
    texts = [
        {"prompt": "the film was", "completion": f" {r['text'].split()[-1]}"}
        for r in reviews(32, 0)
    ]
    write_json_lines(tmp_path / "texts.jsonl", texts)
    write_json_lines(tmp_path / "prompts.jsonl", [{"prompt": "the meal was"}] * 2)
    lines = commands()
    assert len(lines) > 8
    for line in lines:
        before, pipe, command = line.rpartition(" | ")
        given = subprocess.check_output(shlex.split(before), text=True) if pipe else None
        program, *args = shlex.split(command)
        assert program == "laplace-lora"
        run(*args, given=given)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 32
    assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == 32
