"""A text classification with many classes that needs no download: which module is documented?

The first sentence of a docstring of Python or of a package that this project needs anyway; the
class is the module that it stands in. The rows depend on the installed versions.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import random
import re
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

MODULES = """
ast asyncio collections configparser decimal email http imaplib inspect logging mailbox math
multiprocessing pathlib ssl tarfile turtle typing unittest urllib xml zipfile
networkx numpy.linalg numpy.ma numpy.polynomial numpy.random pandas scipy.cluster scipy.integrate
scipy.interpolate scipy.linalg scipy.ndimage scipy.optimize scipy.signal scipy.sparse scipy.spatial
scipy.special scipy.stats sklearn.cluster sklearn.datasets sklearn.decomposition sklearn.ensemble
sklearn.linear_model sklearn.manifold sklearn.metrics sklearn.preprocessing sympy
torch.distributions torch.linalg torch.nn torch.optim torch.special
"""
FEWEST = 40  # sentences of a module
MOST = 80
SHORTEST = 25  # characters
LONGEST = 200


def rows() -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows of text and label in random order, and the names of the classes."""
    modules: dict[str, set[str]] = {}
    for name in MODULES.split():
        for sentence in _sentences(name):
            modules.setdefault(sentence, set()).add(name)
    by_module: dict[str, list[str]] = {}
    for sentence, names in modules.items():
        if len(names) == 1:
            by_module.setdefault(min(names), []).append(sentence)
    source, found = random.Random(0), []
    classes = [name for name in MODULES.split() if len(by_module.get(name, [])) >= FEWEST]
    for label, name in enumerate(classes):
        some = sorted(by_module[name])
        source.shuffle(some)
        found += [{"text": text, "text_pair": None, "label": label} for text in some[:MOST]]
    source.shuffle(found)
    return found, classes


def _sentences(name: str) -> Iterator[str]:
    """Yield the first sentences of what a module and its modules define."""
    for module in _with_children(name):
        for thing in list(vars(module).values()):
            if not str(getattr(thing, "__module__", "")).startswith(name.partition(".")[0]):
                continue
            members = vars(thing).values() if inspect.isclass(thing) else ()
            for each in (thing, *members):
                documented = getattr(each, "__doc__", None)
                if callable(each) and isinstance(documented, str):
                    sentence = _first_sentence(documented)
                    if len(sentence) >= SHORTEST:
                        yield sentence


def _with_children(name: str) -> list[ModuleType]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # a poem
        warnings.simplefilter("ignore")
        root = importlib.import_module(name)
        modules = [root]
        for info in pkgutil.iter_modules(getattr(root, "__path__", [])):
            if info.name.startswith(("test", "__")):
                continue
            try:
                modules.append(importlib.import_module(f"{name}.{info.name}"))
            except ImportError:  # needs what is not installed
                continue
    return modules


def _first_sentence(documented: str) -> str:
    paragraph = inspect.cleandoc(documented).strip().partition("\n\n")[0].replace("\n", " ")
    sentence = re.match(r"(.+?\.)(\s|$)", paragraph)
    return (sentence[1] if sentence else paragraph)[:LONGEST]
