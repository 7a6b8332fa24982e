"""Names of classes, and which of them apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from laplace_lora.commands.reading.columns import listed
from laplace_lora.commands.reading.labels import (
    BOOLEANS,
    GENERIC,
    NUMBERS,
    are_unnamed,
    if_numbers,
    parsed,
)
from laplace_lora.commands.reading.plan import Plan

IF_NUMBERED = (  # why a list is read so
    ", as the data set says, whose lists are of `ClassLabel`; if they hold a 0 or 1 for each "
    "class, save them as plain numbers"
)


def applying(
    labels: Any, names: Sequence[str], number: int, form: str | None = None
) -> list[float]:
    """Return 1 for each class that applies, 0 for the others.

    Args:
        labels: A list of their names, of classes without names of their own also as ``LABEL_1``; or
            of 0 and 1 for each class, -100 where that is not known; of a single class also without
            the list.
        names: Names of the classes, in the order of the model's outputs.
        number: The row's, from 1.
        form: `NUMBERS` if lists hold the numbers of those that apply.

    Raises:
        ValueError: If it is neither.
    """
    if len(names) == 1 and not isinstance(labels, list):
        labels, form = [_number(labels, names[0])], None
    if isinstance(labels, list):
        as_numbers = len(labels) == len(names) and all(label in ("0", "1") for label in labels)
        if as_numbers and are_unnamed(names):
            raise ValueError(
                f"row {number} has the label {labels!r}, whose texts may be the numbers of classes "
                "that apply, or whether each does: write numbers as LABEL_0 and so on, a 0 or 1 "
                "for each without quotation marks, or names, given by --labels"
            )
        given = [_name(label, names, form) for label in labels]
        if all(name in names for name in given):
            if len(set(given)) < len(given):
                raise ValueError(
                    f"row {number} has the label {labels!r}, which names a class twice; name each "
                    f"that applies once{IF_NUMBERED if form == NUMBERS else ''}"
                )
            return [float(name in given) for name in names]
        if form == NUMBERS:
            raise ValueError(
                f"row {number} has the label {labels!r}; expected a list of numbers of classes, "
                f"from 0 to {len(names) - 1}{IF_NUMBERED}"
            )
        if len(labels) == len(names) and all(label in (0, 1, -100) for label in labels):
            return [float(label) for label in labels]
    raise ValueError(
        f"row {number} has the label {labels!r}; expected a list of those that apply, of "
        f"{listed(names)}, or one 0 or 1 for each of them{if_numbers(labels, names)}"
    )


def _name(label: Any, names: Sequence[str], form: str | None) -> Any:
    """Return the name of a class of a list, or what is no class as it is."""
    if form == NUMBERS:
        is_known = type(label) is int and 0 <= label < len(names)
        return names[label] if is_known else None
    # The only class of a sigmoid is called 0, which as a label says that it does not apply.
    is_generic = len(names) > 1 and are_unnamed(names) and isinstance(label, str)
    return label.removeprefix(GENERIC) if is_generic else label


def _number(label: Any, name: str) -> Any:
    """Return a label as a number if it is one, as a table without types has words for them."""
    try:
        return parsed(label if label == name else BOOLEANS.get(str(label).strip().lower(), label))
    except (TypeError, ValueError, OverflowError):
        return label


def class_names(given: Sequence[str], of_model: Sequence[str], outputs: int) -> list[str]:
    """Return the names of a model's classes: those given, the model's own, or numbers.

    Raises:
        ValueError: If not as many names are given as there are classes, two are the same (their
            probabilities would be under one name), or they are the model's in another order.
    """
    if given and len(given) != outputs:
        raise ValueError(f"--labels names {len(given)} classes, the model has {outputs}")
    names = list(given or of_model or map(str, range(outputs)))
    if len(set(names)) < len(names):
        who = "--labels names" if given else "the model names"
        hint = "" if given else "; give each a name of its own by --labels"
        raise ValueError(f"{who} a class twice: {listed(names)}{hint}")
    numbers = range(outputs)
    unnamed = (list(map(str, numbers)), [f"LABEL_{number}" for number in numbers])
    for own in unnamed if not of_model or are_unnamed(of_model) else (of_model,):
        if list(own) != names and sorted(own) == sorted(names):
            raise ValueError(
                f"--labels has the order {listed(names)}, and the model's outputs "
                f"have the order {listed(own)}; leave --labels out. If the model's "
                "configuration is wrong, correct its `id2label`"
            )
    return names


def check_order(
    names: Sequence[str], named: Mapping[str, Sequence[str]], column: str | None, source: str
) -> None:
    """Refuse data whose numbers stand for the model's classes in another order.

    Case does not matter. Names that are others altogether, translated ones, say, tell nothing, and
    neither do mere numbers.

    Raises:
        ValueError: If a name of both has another place in each.
    """
    model, data = ([name.strip() for name in x] for x in (names, named.get(column or "", ())))
    one, other = ([name.casefold() for name in x] for x in (model, data))
    if len({*one}) < len(one) or len({*other}) < len(other):
        one, other = model, data
    common = {*one} & {*other}
    if not are_unnamed(data) and any(one.index(name) != other.index(name) for name in common):
        numbered, said = (listed(x) for x in (data, model))
        raise ValueError(
            f"{source}: the column {column!r} numbers the classes in the order {numbered}, and the "
            f"model's outputs, as options or its configuration say, have the order {said}. Correct "
            "what is wrong: --labels or --target, the configuration's `id2label`, or the numbers, "
            "by the data set's `align_labels_with_mapping`"
        )


def read_as_numbered(
    plan: Plan, named: Mapping[str, Sequence[str]], options: Mapping[str, Any], source: str
) -> Plan:
    """Return how a file is read, whose column of labels may itself say that they are numbers.

    Raises:
        ValueError: If the numbers stand for the classes in another order.
    """
    check_order(plan.names, named, plan.columns.label, source)
    of_data = named.get(plan.columns.label or "", ())
    if plan.likelihood == "multilabel":  # the fit's lists say nothing of other lists
        # Two names for other than two classes are those of 0 and 1.
        is_numbered = len(of_data) > 2 or len(of_data) == len(plan.names)
        return replace(plan, labels_as=NUMBERS if is_numbered else None)
    are_told = of_data and not are_unnamed(of_data) and not are_unnamed(plan.names)
    if are_told and plan.likelihood == "classification" and options.get("labels_as") is None:
        return replace(plan, labels_as=NUMBERS)
    return plan
