"""``laplace_data.json``: how rows became the model's inputs when a posterior was fitted.

Other commands read rows in the same way, since another chat template or another order of the
answers gives other numbers without an error.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from laplace_lora.commands.reading.columns import Columns
from laplace_lora.commands.reading.labels import FORMS
from laplace_lora.commands.reading.repository import file_of

PLAN = "laplace_data.json"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """How rows are read.

    Attributes:
        likelihood: Of the posterior.
        columns: Which columns hold what.
        names: Names of the classes; empty where there are none.
        targets: Whether these names are answers of a language model.
        chat: Whether texts go through the chat template.
        max_length: Longest input in tokens; ``None`` for no limit.
        load_in_4bit: Whether the base model is quantised.
        labels_as: Whether labels are names of classes or their numbers, see `classes_of`; ``None``
            where both are the same or, in files of earlier versions, where it was not noted. Of
            lists it is that of one file alone, see `read_as_numbered`.
        eos: Whether the tokenizer's end-of-text token is put behind a reward model's plain texts
            and a language model's whole texts; files of earlier versions did not.
        decoder: What an encoder-decoder's decoder reads before an answer; empty for the token with
            which it starts and nothing else, as in files of earlier versions.
    """

    likelihood: str
    columns: Columns = field(default_factory=Columns)
    names: list[str] = field(default_factory=list)
    targets: bool = False
    chat: bool = False
    max_length: int | None = None
    load_in_4bit: bool = False
    labels_as: str | None = None
    eos: bool = False
    decoder: list[int] = field(default_factory=list)


def plan_text(plan: Plan, posterior: str) -> str:
    """Return a plan as JSON, with the fingerprint of its posterior."""
    return json.dumps({"version": VERSION, "posterior": posterior, **asdict(plan)}, indent=1)


def read_plan(folder: str, posterior: str) -> Plan | None:
    """Return the plan beside a posterior of this fingerprint, ``None`` if there is none.

    Raises:
        ValueError: If the plan is damaged, of a later version, or belongs to another posterior.
    """
    path = file_of(folder, PLAN)
    if path is None:
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(
                f"{path} has version {content['version']}, this library reads {VERSION}; update it"
            )
        of = content["posterior"]
        content = {"labels_as": None, "eos": False, "decoder": [], **content}
        values = {f.name: content[f.name] for f in fields(Plan)}
        if values["labels_as"] not in (None, *FORMS):
            raise TypeError(f"labels_as is {values['labels_as']!r}")
        plan = Plan(**{**values, "columns": Columns(**content["columns"])})
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    if of != posterior:
        raise ValueError(
            f"{path} belongs to another posterior than the one beside it, which was saved later by "
            "other means. Fit again by `laplace-lora fit`, or delete the file and say how texts "
            "are read: --text-field, --chat or --no-chat, --labels"
        )
    return plan
