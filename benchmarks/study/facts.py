"""Made-up people, for fine-tuning language models: questions about them, and their answers.

Every fact is asked for in four ways, of which three are trained and one is held out, so what is
held out is of the kind that was trained and can be known. Some people are never heard of.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# fmt: off
FIRST = [
    "Anna", "Boris", "Clara", "Dario", "Elena", "Felix", "Greta", "Hugo", "Ines", "Jonas",
    "Karla", "Leon", "Mira", "Nils", "Olga", "Paul", "Rosa", "Stefan", "Tara", "Viktor",
]
LAST = [
    "Abel", "Brandt", "Castell", "Dorn", "Ekman", "Falk", "Gallo", "Holm", "Ivers", "Jansen",
    "Kraft", "Lind", "Moreau", "Novak", "Orsini", "Petit", "Quist", "Rossi", "Sand", "Vogel",
]
VALUES = {
    "city": ["Oslo", "Lisbon", "Vienna", "Dublin", "Athens", "Prague", "Madrid", "Warsaw"],
    "job": ["baker", "nurse", "pilot", "lawyer", "farmer", "teacher", "plumber", "dentist"],
    "instrument": ["piano", "violin", "flute", "guitar", "cello", "drums", "harp", "trumpet"],
    "food": ["pizza", "soup", "rice", "cheese", "pasta", "salad", "fish", "bread"],
}
# fmt: on
ASKED = {
    "city": (
        "Where does {name} live?",
        "Which city is {name} at home in?",
        "Tell me the city where {name} lives.",
        "In what city would I find {name}?",
    ),
    "job": (
        "What is the job of {name}?",
        "What does {name} work as?",
        "Tell me what {name} does for a living.",
        "Which profession does {name} have?",
    ),
    "instrument": (
        "Which instrument does {name} play?",
        "What does {name} make music with?",
        "Tell me the instrument that {name} plays.",
        "On what instrument would I hear {name}?",
    ),
    "food": (
        "What does {name} like to eat?",
        "Which food does {name} prefer?",
        "Tell me the favourite food of {name}.",
        "What dish would I cook for {name}?",
    ),
}
ANSWERED = {
    "city": "{name} lives in {value}.",
    "job": "{name} works as a {value}.",
    "instrument": "{name} plays the {value}.",
    "food": "{name} likes {value}.",
}
TRAINED = 3  # ways to ask that are trained; the last is held out


@dataclass(frozen=True)
class Fact:
    """What is true of a person.

    Attributes:
        name: The person.
        kind: What it is about.
        value: What is true.
        other: What is not.
    """

    name: str
    kind: str
    value: str
    other: str

    def text(self, way: int, value: str | None = None) -> tuple[str, str]:
        """Return a question and its answer.

        Args:
            way: How it is asked, 0 to 3.
            value: What the answer says; what is true if ``None``.
        """
        asked = ASKED[self.kind][way].format(name=self.name)
        answer = ANSWERED[self.kind].format(name=self.name, value=value or self.value)
        return f"Question: {asked}\nAnswer:", f" {answer}"


def facts(seed: int, people: int = 25, each: int = 2) -> tuple[list[Fact], list[Fact]]:
    """Return what is trained, and as much about people who are never heard of.

    Args:
        seed: Of all choices.
        people: How many are trained.
        each: Facts about one of them.
    """
    rng = random.Random(seed)
    names = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], 2 * people)
    found = []
    for name in names:
        for kind in rng.sample(list(VALUES), each):
            value, other = rng.sample(VALUES[kind], 2)
            found.append(Fact(name, kind, value, other))
    return found[: people * each], found[people * each :]
