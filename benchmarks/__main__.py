"""List the benchmarks, a line each, and how to run them."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

FOLDER = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Return the first line of every benchmark's text by the name of its module."""
    lines = {}
    for path in sorted(FOLDER.glob("*/*.py")):
        source = path.read_text(encoding="utf-8")
        if "\nif __name__ ==" in source:
            parts = path.relative_to(FOLDER).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__main__")
            lines[name] = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    listed = benchmarks()
    width = max(map(len, listed))
    print("From the repository's root; --help shows the options of each:\n")
    for name, line in listed.items():
        print(f"  python -m benchmarks.{name:<{width}}  {line}")
    print("\nResults so far: benchmarks/README.md")


if __name__ == "__main__":
    main()
