"""`SpanPredictions`: what a posterior says of where the answers of questions are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.display.results import Columns, Result, known_fields
from laplace_lora.display.tables import SHOWN_ROWS, plain

SHOWN = ("true_start", "true_end", "start", "end", "prob", "no_answer", "mutual_information")


@dataclass(frozen=True, repr=False)
class SpanPredictions(Result):
    """The posterior predictive of spans: pairs of a first and a last token.

    Places count the tokens of a row or text as it was given; of a batch, its padding as well.

    Attributes:
        none: The place that stands for no answer, the first real token, ``(questions,)``.
        start: First token of the most probable span in the context, ``(questions,)``.
        end: Its last token.
        prob: Its probability under the predictive: of this start and this end together.
        no_answer: Probability that there is no answer: that `none` is both start and end.
        entropy: Entropy of the predictive over all pairs in nats: total uncertainty.
        mutual_information: Its epistemic part, which more training data would remove.
        map_start: The same five at the posterior's mean.
        map_end: See above.
        map_prob: See above.
        map_no_answer: See above.
        map_entropy: See above.
        labels: First and last token of the true answers, ``(questions, 2)``, where all batches have
            them.
        label_prob: Their probability under the predictive, likewise.
        map_label_prob: And at the posterior's mean.
    """

    none: Tensor
    start: Tensor
    end: Tensor
    prob: Tensor
    no_answer: Tensor
    entropy: Tensor
    mutual_information: Tensor
    map_start: Tensor
    map_end: Tensor
    map_prob: Tensor
    map_no_answer: Tensor
    map_entropy: Tensor
    labels: Tensor | None = None
    label_prob: Tensor | None = None
    map_label_prob: Tensor | None = None

    @property
    def by_map(self) -> SpanPredictions:
        """What the model says at the posterior's mean, without any doubt about its weights."""
        values = known_fields(self)
        own = {n.removeprefix("map_"): v for n, v in values.items() if n.startswith("map_")}
        return replace(self, **own, mutual_information=torch.zeros_like(self.entropy))

    @property
    def has_answer(self) -> Tensor:
        """Whether the best span is more probable than no answer, ``(questions,)``."""
        return self.prob > self.no_answer

    @property
    def answer(self) -> Tensor:
        """First and last token of the answer, or `none` twice, ``(questions, 2)``."""
        spans = torch.stack([self.start, self.end], dim=-1)
        return torch.where(self.has_answer.unsqueeze(1), spans, self.none.unsqueeze(1))

    @property
    def confidence(self) -> Tensor:
        """Probability of `answer`, ``(questions,)``."""
        return torch.maximum(self.prob, self.no_answer)

    @property
    def aleatoric(self) -> Tensor:
        """The entropy's other part in nats: its mean under samples of the weights."""
        return self.entropy - self.mutual_information

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.start)

    def __getitem__(self, index: Any) -> SpanPredictions:
        """Return the predictions of some questions: a slice, a mask or indices."""
        return SpanPredictions(**{k: v[index] for k, v in known_fields(self).items()})

    def moved(self, steps: Tensor) -> SpanPredictions:
        """Return the same with the places of each question moved, by ``(questions,)`` tokens."""
        steps = steps.to(self.none.device)
        names = ("none", "start", "end", "map_start", "map_end")
        places: dict[str, Any] = {name: getattr(self, name) + steps for name in names}
        if self.labels is not None:
            places["labels"] = self.labels + steps.unsqueeze(1)
        return replace(self, **places)

    def __repr__(self) -> str:
        """Return one line: how many questions and answers, and means of the uncertainties."""
        text = f"SpanPredictions of {len(self)} questions"
        if not len(self):
            return text
        return (
            f"{text}, {int(self.has_answer.sum())} with an answer: mean entropy "
            f"{self.entropy.mean():.4g} nats, of which {self.mutual_information.mean():.4g} "
            "epistemic"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as lists by name, one entry per question."""
        return self._columns()

    def _table(self) -> tuple[Columns, str, int]:
        columns = self._columns()
        shown = {name: columns[name] for name in SHOWN if name in columns}
        return {"question": list(range(len(self))), **shown}, repr(self), SHOWN_ROWS

    def _columns(self) -> dict[str, list[Any]]:
        values = {name: value for name, value in known_fields(self).items() if name != "labels"}
        if self.labels is not None:
            values |= {"true_start": self.labels[:, 0], "true_end": self.labels[:, 1]}
        values["has_answer"] = self.has_answer
        return {name: plain(value) for name, value in values.items()}
