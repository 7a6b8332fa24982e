"""The documents: their Python runs, their links lead somewhere, the README stays short.

The ``python`` blocks of a document run in order, in one namespace that starts with the names of
``examples/guides/tiny-model.md``. A block is left out only if the line before it says why:
``<!-- not run: reason -->``.
"""

import copy
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
EXAMPLES = ROOT / "examples" / "README.md"
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
TINY = ROOT / "examples" / "guides" / "tiny-model.md"
CHANGES = ROOT / "examples" / "guides" / "changes.md"
DOCUMENTS = [README, EXAMPLES, *GUIDES]
LINKED = [*DOCUMENTS, ROOT / "benchmarks" / "README.md"]
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
QUICKSTART = 'pip install ".[examples]" && python examples/quickstart.py'


def name_of(path):
    return str(path.relative_to(ROOT))


def code_blocks(text, language="python"):
    """Return number of the first line, code, and whether to run it, for each block."""
    blocks, lines, start = [], text.splitlines(), None
    for i, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start, wanted = i + 1, line == f"```{language}"
            runs = i == 0 or not NOT_RUN.fullmatch(lines[i - 1])
        elif start is not None and line == "```":
            if wanted:
                blocks.append((start, "\n".join(lines[start:i]), runs))
            start = None
    assert start is None, f"the block of line {start} does not end"
    return blocks


def run_blocks(path, text, namespace):
    for start, code, runs in code_blocks(text):
        if runs:
            # Empty lines in front, so that a traceback names the line of the document.
            exec(compile("\n" * start + code, str(path), "exec"), namespace)


def prose(text):
    """Return a document without its code blocks and comments."""
    return re.sub(r"<!--.*?-->", "", re.sub(r"```.*?\n```", "", text, flags=re.S), flags=re.S)


def anchors(text):
    """Return the names that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text):
    """Return the targets of a document's links and pictures that are no addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [t for t in targets if not t.startswith(("http://", "https://", "mailto:"))]


def broken_links(path):
    broken = []
    for target in links(path.read_text()):
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        known = there.exists() and (not anchor or anchor in anchors(there.read_text()))
        if not known:
            broken.append(target)
    return broken


@pytest.fixture(scope="module")
def tiny():
    """The names of ``tiny-model.md``."""
    namespace = {"__name__": "document"}
    with torch.random.fork_rng():
        run_blocks(TINY, TINY.read_text(), namespace)
    return namespace


@pytest.mark.parametrize("path", [d for d in DOCUMENTS if d != TINY], ids=name_of)
def test_the_code_runs(path, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {**tiny, "peft_model": copy.deepcopy(tiny["peft_model"])}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run_blocks(path, path.read_text(), namespace)


def test_only_blocks_that_say_why_are_left_out():
    text = "```python\na = 1\n```\n<!-- not run: needs a hub -->\n```python\na = 2\n```\n"
    text += "<!-- not run: -->\n```python\nb = a\n```\n```bash\na b\n```\n"
    namespace = {}
    run_blocks("text", text, namespace)
    assert namespace["a"] == namespace["b"] == 1
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks("text", "\n\n```python\na = 1\n1 / 0\n```\n", {})
    assert caught.traceback[-1].lineno == 4  # counted from zero
    with pytest.raises(AssertionError, match="does not end"):
        code_blocks("```python\na = 1\n")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_reason_stands_right_before_its_block(path):
    text = path.read_text()
    reasons = len(re.findall(r"<!-- not run", text))
    assert reasons == sum(not runs for *_, runs in code_blocks(text))


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A `name`: and more\n")
    path = tmp_path / "text.md"
    path.write_text(
        "## Here\n[a](there.md#a-name-and-more) [b](#here) [c](https://example.org/x)\n"
        "[d](gone.md) [e](there.md#gone) [f](#gone)\n```python\nx[0](1)\n```\n"
    )
    assert broken_links(path) == ["gone.md", "there.md#gone", "#gone"]


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 8000


def test_the_readme_says_how_to_start_and_how_to_test():
    text = README.read_text()
    section = text.split("## Run the tests\n")[1].split("\n## ")[0]
    ((_, command, _),) = code_blocks(section, "bash")
    assert command.count("\n") == 0 and command.count("&&") == 1
    assert QUICKSTART in [code for _, code, _ in code_blocks(text, "bash")]


def test_every_guide_and_every_example_is_listed():
    examples = EXAMPLES.read_text()
    assert "(examples/README.md#guides)" in README.read_text()
    for guide in GUIDES:
        assert f"(guides/{guide.name}" in examples
    for script in (ROOT / "examples").glob("*.py"):
        if "__main__" in script.read_text():
            assert f"({script.name}" in examples


def test_the_modules_that_the_changes_name_exist():
    rows = re.findall(r"^\| `laplace_lora\..* \| (.*) \|$", CHANGES.read_text(), flags=re.M)
    modules = re.findall(r"laplace_lora[\w.]+", " ".join(rows))
    assert len(modules) > 10
    assert [name for name in modules if find_spec(name) is None] == []
