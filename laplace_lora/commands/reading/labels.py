"""What the labels of a file mean: classes, all by names or all by numbers, or numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from laplace_lora.commands.reading.columns import listed

NAMES, NUMBERS = "names", "numbers"
FORMS = (NAMES, NUMBERS)
OPTION = "--labels-as"
GENERIC = "LABEL_"  # before a number, Hugging Face's name of a class
BOOLEANS = {"false": 0, "true": 1}  # in small letters; as of JSON, so the words of tables


def classes_of(
    labels: Sequence[Any], names: Sequence[str], form: str | None
) -> tuple[list[int], str | None]:
    """Return the classes that the labels of a file mean.

    Read one by one, the labels 0 and 1 of the classes "1" and "2" would both mean the first class.

    Args:
        labels: One for each row: a class's name, with or without spaces around it, or its number
            from 0. Of classes without names of their own also Hugging Face's (``LABEL_1``), and of
            two of these ``True`` and ``False``, also as texts. Where classes are called so, in
            whatever letters, these are names.
        names: Names of the classes, in the order of the model's outputs.
        form: How the labels were read before, or are to be read, where they may be either:
            `NAMES` or `NUMBERS`; ``None`` if nobody has said. Where no class is called by a number,
            labels that are all of the other form are taken all the same.

    Returns:
        The classes, and how the labels were read; ``None`` if both ways lead to the same.

    Raises:
        ValueError: If a label means no class, some are only names and others only numbers, or
            names and numbers would be different classes and nobody has said which they are.
    """
    booleans = _booleans(names)
    labels = [booleans.get(str(label).strip().lower(), label) for label in labels]
    numbers = [_numbered(label, names) for label in labels]
    read: dict[str, list[int | None]] = {NAMES: _named(labels, names), NUMBERS: numbers}
    for row, label in enumerate(labels, start=1):
        if all(classes[row - 1] is None for classes in read.values()):
            is_boolean = str(label).strip().lower() in BOOLEANS
            is_named = any(name.strip().lower() in BOOLEANS for name in names)
            neither = ", and true and false are neither" if is_boolean and not is_named else ""
            raise ValueError(
                f"row {row} has the label {label!r}; expected one of "
                f"{listed(names)}, or a number from 0 to {len(names) - 1}{neither}. "
                "--labels names the classes in the order of the model's outputs"
                f"{if_numbers(label, names)}"
            )
    whole = {
        way: [i for i in classes if i is not None]
        for way, classes in read.items()
        if None not in classes
    }
    if form in whole:
        return whole[form], form
    if form is not None and (any(i is not None for i in read[form]) or _any_numeral(names)):
        row, label = next((n, y) for n, y in enumerate(labels, 1) if read[form][n - 1] is None)
        raise ValueError(
            f"labels are read as {form}, as in the fit or as {OPTION} says, and row {row} has "
            f"{label!r}, which is none of the {form}; {_expected(names)}"
        )
    if not whole:
        first = {w: next(n for n, i in enumerate(c) if i is None) for w, c in read.items()}
        raise ValueError(
            f"labels must all be names or all be numbers: row {first[NUMBERS] + 1} has "
            f"{labels[first[NUMBERS]]!r}, only a name, and row {first[NAMES] + 1} has "
            f"{labels[first[NAMES]]!r}, only a number; {_expected(names)}"
        )
    if len(whole) == 1:
        (way,) = whole
        return whole[way], way
    if whole[NAMES] == whole[NUMBERS]:
        return whole[NAMES], None
    row = next(n for n, (i, j) in enumerate(zip(*whole.values(), strict=True)) if i != j)
    raise ValueError(
        f"the labels may be names or numbers: {labels[row]!r} in row {row + 1} is the name of "
        f"class {whole[NAMES][row]}, and the number of {names[whole[NUMBERS][row]]!r}. Say which "
        f"by {OPTION} names or {OPTION} numbers"
    )


def if_numbers(label: Any, names: Sequence[str]) -> str:
    """Return what to do if a label that was refused is a regression's target, as an error ends."""
    values = label if isinstance(label, list) and len(label) == len(names) else [None]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return ""
    return "; if these numbers are a regression's targets, say --likelihood regression"


def _booleans(names: Sequence[str]) -> dict[str, Any]:
    """Return the labels that true and false stand for, by these words in small letters."""
    if are_unnamed(names) and len(names) == len(BOOLEANS):
        return dict(BOOLEANS)
    words = [name.strip().lower() for name in names]
    if any(words.count(word) != 1 for word in BOOLEANS):
        return {}
    return {word: names[words.index(word)] for word in BOOLEANS}


def are_unnamed(names: Sequence[str]) -> bool:
    """Return whether classes have no names of their own, only their numbers."""
    return list(names) == list(map(str, range(len(names))))


def _named(labels: Sequence[Any], names: Sequence[str]) -> list[int | None]:
    """Return the class that each label names, ``None`` where there is none."""
    exact = {name: i for i, name in enumerate(names)}
    if are_unnamed(names):
        exact |= {f"{GENERIC}{i}": i for i in range(len(names))}
    count = Counter(name.strip() for name in names)
    bare = {name.strip(): i for name, i in exact.items() if count[name.strip()] == 1}
    return [exact.get(text, bare.get(text.strip())) for text in map(str, labels)]


def _numbered(label: Any, names: Sequence[str]) -> int | None:
    """Return the class of this number, ``None`` if there is none."""
    text = str(label).strip()
    # Tables in which a label was missing hold 1.0 for 1.
    whole = re.fullmatch(r"(\d+)\.0", text)
    if whole is not None and text not in names:
        text = whole[1]
    if isinstance(label, bool) or not text.isdecimal() or int(text) >= len(names):
        return None
    return int(text)


def _any_numeral(names: Sequence[str]) -> bool:
    """Return whether a class is called by a number, which another class may have."""
    return any(re.fullmatch(r"\s*[+-]?\d+(\.\d*)?\s*", name) for name in names)


def _expected(names: Sequence[str]) -> str:
    return (
        f"names are {listed(names)}, numbers 0 to {len(names) - 1}. Write all labels "
        f"in one way, or say how to read them by {OPTION}"
    )


def numbers_of(label: Any, number: int, outputs: int) -> float | list[float]:
    """Return a regression's target: a number, or a list of them for several outputs.

    Raises:
        ValueError: If the label is something else.
    """
    values = label if isinstance(label, list) else [label]
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError("a boolean is a class")
        found = [parsed(value) for value in values]
    except OverflowError:
        found = [math.inf]
    except (TypeError, ValueError):
        raise ValueError(f"row {number} has the label {label!r}, no number") from None
    if not all(map(math.isfinite, found)):
        written = repr(label)[:60]
        raise ValueError(f"row {number} has the label {written}; expected finite numbers")
    if len(found) != outputs:
        raise ValueError(f"row {number} has the label {label!r}; expected {_targets(outputs)}")
    return found if outputs > 1 else found[0]


def parsed(value: Any) -> float:
    """Return a number, or what a text writes as one; "1_000", as Python writes it, is none.

    Raises:
        OverflowError: If it is too large.
        TypeError: If it is neither a number nor a text.
        ValueError: If a text is no number.
    """
    if isinstance(value, str) and "_" in value:
        raise ValueError(f"no number: {value!r}")
    return float(value)


def _targets(outputs: int) -> str:
    if outputs == 1:
        return "a number"
    return (
        f"a list of {outputs} numbers, the targets of a regression, as model or options say; for "
        "classes say --likelihood classification or multilabel"
    )
