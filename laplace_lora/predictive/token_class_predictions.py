"""`TokenClassPredictions`: what a posterior says of the class of every token, or of every word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.columns import padded
from laplace_lora.display.results import Columns, Result, known_fields
from laplace_lora.display.tables import SHOWN_ROWS, plain, spread
from laplace_lora.likelihoods.language_modeling import IGNORED


@dataclass(frozen=True, repr=False)
class TokenClassPredictions(Result):
    """The posterior predictive of tokens' classes, laid out as the tokens are in their batch.

    Zeros, and ``mask`` false, where there is padding. Batches of different lengths are filled up on
    the right.

    Attributes:
        mask: Where there are tokens, ``(texts, tokens)``.
        map_probs: Class probabilities at the posterior's mean, ``(texts, tokens, classes)``.
        probs: Class probabilities of the predictive.
        entropy: Its entropy in nats, ``(texts, tokens)``: total uncertainty.
        mutual_information: Its epistemic part, which more training data would remove.
        labels: Labels, -100 where there is none; ``None`` where not all batches have them.
    """

    mask: Tensor
    map_probs: Tensor
    probs: Tensor
    entropy: Tensor
    mutual_information: Tensor
    labels: Tensor | None = None

    @property
    def aleatoric(self) -> Tensor:
        """The entropy's other part in nats: the mean entropy of the softmax."""
        return self.entropy - self.mutual_information

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.mask)

    def __getitem__(self, index: Any) -> TokenClassPredictions:
        """Return the predictions of some texts: a slice, a mask or indices."""
        return self._map(lambda value: value[index])

    def words(self, word_ids: Sequence[Sequence[int | None]]) -> TokenClassPredictions:
        """Return the predictions of words: of each, that of its first token.

        So token classifiers are trained by default: the first token of a word has its label, the
        others -100. Source: Devlin et al. (2019), arXiv:1810.04805, section 5.3.

        Args:
            word_ids: For each text the word of every token, ``None`` for special tokens and
                padding, as ``encoding.word_ids(n)`` gives them: of the text by itself, or as it
                stands in its batch.

        Returns:
            Predictions with a column per word, ``(texts, words, …)``; words that were cut off have
            a false ``mask``.

        Raises:
            ValueError: If there are not as many lists as texts, one does not fit its text's tokens,
                or a text has two parts, whose words have the same numbers.
        """
        if len(word_ids) != len(self):
            raise ValueError(f"{len(self)} texts need as many word_ids, got {len(word_ids)}")
        first = [_first_tokens(n, ids, self.mask[n]) for n, ids in enumerate(word_ids)]
        width = max((max(places, default=-1) + 1 for places in first), default=0)
        at = torch.zeros(len(first), width, dtype=torch.long)
        mask = torch.zeros(len(first), width, dtype=torch.bool)
        for n, places in enumerate(first):
            for word, token in places.items():
                at[n, word], mask[n, word] = token, True
        at, mask = at.to(self.mask.device), mask.to(self.mask.device)
        texts = torch.arange(len(first), device=at.device).unsqueeze(1)
        chosen = self._map(lambda value: value[texts, at])
        return chosen._map(lambda value: _filled(value, mask, _fill(value, chosen)))

    def __repr__(self) -> str:
        """Return one line: how many texts and tokens, and means of the uncertainties."""
        n = max(int(self.mask.sum()), 1)
        entropy, information = self.entropy.sum() / n, self.mutual_information.sum() / n
        return (
            f"TokenClassPredictions of {len(self)} texts, {int(self.mask.sum())} tokens, "
            f"{self.probs.shape[-1]} classes: mean entropy {entropy:.4g} nats, of which "
            f"{information:.4g} epistemic"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"texts": [...]}``: each text's tokens one by one, without padding."""
        columns = self._columns()
        texts: list[list[dict[str, Any]]] = [[] for _ in range(len(self))]
        for text, *row in zip(*columns.values(), strict=True):
            texts[text].append(dict(zip(list(columns)[1:], row, strict=True)))
        return {"texts": texts}

    def _table(self) -> tuple[Columns, str, int]:
        columns = self._columns()
        columns["prob_0"] = plain(self.probs[self.mask].amax(1))
        names = {"prob_0": "confidence"}
        shown = {
            names.get(name, name): values
            for name, values in columns.items()
            if name in names or not name.startswith("prob_")
        }
        return shown, repr(self), SHOWN_ROWS

    def _columns(self) -> dict[str, list[Any]]:
        texts, tokens = self.mask.nonzero(as_tuple=True)
        columns = {"text": plain(texts), "token": plain(tokens)}
        if self.labels is not None:
            columns["label"] = plain(self.labels[self.mask])
        probs = self.probs[self.mask]
        columns |= {"prediction": plain(probs.argmax(1)), **spread("prob", probs)}
        for name in ("entropy", "mutual_information"):
            columns[name] = plain(getattr(self, name)[self.mask])
        return columns

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenClassPredictions:
        changed = {name: change(value) for name, value in known_fields(self).items()}
        return TokenClassPredictions(**changed)

    def widened(self, width: int) -> TokenClassPredictions:
        """Return the same, filled up on the right to a number of tokens."""
        return self._map(lambda value: padded(value, width, _fill(value, self)))

    @classmethod
    def laid_out(cls, mask: Tensor, *rows: Tensor) -> TokenClassPredictions:
        """Put values of single tokens in their places.

        Args:
            mask: Where there are tokens, ``(texts, tokens)``.
            *rows: ``map_probs`` and so on, ``(tokens, …)`` each, texts one after the other.
        """
        return cls(mask, *(at_tokens(mask, values) for values in rows))


def at_tokens(mask: Tensor, values: Tensor) -> Tensor:
    """Return values of single tokens, ``(tokens, …)``, in their places, zeros elsewhere.

    Args:
        mask: Where there are tokens, ``(texts, tokens)``.
        values: Texts one after the other.
    """
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    out[mask] = values
    return out


def _fill(value: Tensor, whole: TokenClassPredictions) -> int:
    return IGNORED if value is whole.labels else 0


def _filled(value: Tensor, mask: Tensor, fill: int) -> Tensor:
    return value.masked_fill(~mask.view(*mask.shape, *[1] * (value.ndim - 2)), fill)


def _first_tokens(n: int, ids: Sequence[int | None], mask: Tensor) -> dict[int, int]:
    """Return the first token of each word of a text."""
    real = mask.nonzero().flatten().tolist()
    places = real if len(ids) == len(real) else list(range(len(ids)))
    inside = set(real)
    first: dict[int, int] = {}
    latest = -1
    for word, place in zip(ids, places, strict=True):
        if word is None:
            continue
        if place not in inside:
            raise ValueError(
                f"word_ids of text {n} has {len(ids)} entries, and word {word} is where the text "
                f"has padding: it has {len(real)} tokens in {len(mask)} places"
            )
        if word < latest:
            raise ValueError(
                f"the words of text {n} are not in order: a row with two texts has two words of "
                "each number; set word_ids of the part that has no labels to None"
            )
        latest = word
        first.setdefault(word, place)
    return first
