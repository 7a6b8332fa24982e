"""Programs of the folder ``examples``, imported as they are run."""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples"


def imported(name, monkeypatch):
    """Import an example, without arguments on its command line."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "support", raising=False)  # the examples have one too
        module = importlib.import_module(name)
        sys.modules.pop("support", None)
    return module
