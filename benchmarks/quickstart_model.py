"""The quickstart as a module, for the benchmarks that train its model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load_quickstart() -> ModuleType:
    """Import the quickstart by its path: examples are no package."""
    path = Path(__file__).parents[1] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
