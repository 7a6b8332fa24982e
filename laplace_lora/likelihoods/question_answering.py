"""Extractive question answering: the first and the last token of an answer, a softmax for each.

Outputs are logits of every token as start, then of every token as end, ``(batch, 2 · tokens)``;
padding has no probability. Labels are the answer's first and last token, ``(batch, 2)``; a
question without an answer has the first real token as both, as in SQuAD 2.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.data.batches import has_labels
from laplace_lora.likelihoods.base import Likelihood, Readout, Scoring
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.real_tokens import real_tokens_of
from laplace_lora.likelihoods.roots import (
    LARGEST_ROOT,
    sampled_softmax_root,
    softmax_residual,
    softmax_root,
)
from laplace_lora.likelihoods.splitting import split_mapping_or_pair

START, END = "start_positions", "end_positions"  # as Hugging Face's models take them
CONTEXT = "context_mask"  # where an answer may be; of this package
NOT_INPUTS = ("labels", START, END, CONTEXT)


PLACES = f"{START!r} and {END!r}"
text_tokens = partial(real_tokens_of, task="question answering", labels=PLACES)


class QuestionAnswering(Likelihood):
    """The likelihood of a start and an end, independent given the outputs."""

    name = "question_answering"
    laplace_name = "classification"
    is_classifier = True
    samples_labels = True
    has_spans = True
    jacobian_refusal: str | None = (
        "the outputs of a question-answering model are all tokens, as start and as end, too many "
        "for Jacobians: `la(batch)` and `la.predict(data)` predict spans from samples. Tune the "
        "prior with method='widest' or 'marglik', and `calibrate` the width on other questions"
    )

    def split(
        self, batch: Any, label_key: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Tensor]:
        """Split a batch into texts, with their labels, and the labels ``(batch, 2)``.

        Raises:
            TypeError: If the batch is no mapping of texts.
            ValueError: If labels are missing, or are no real tokens in order.
        """
        if isinstance(batch, Mapping) and all(has_labels(batch, name) for name in (START, END)):
            x, y = batch, torch.stack([torch.as_tensor(batch[k]) for k in (START, END)], dim=-1)
        elif isinstance(batch, Mapping) and label_key not in batch:
            raise ValueError(
                f"a batch has neither {START!r} and {END!r} nor {label_key!r}, only {sorted(batch)}"
            )
        else:
            x, y = split_mapping_or_pair(batch, label_key, device)
        y = span_labels(x, y).to(device)
        return {**{k: v for k, v in x.items() if k not in (label_key, START, END)}, "labels": y}, y

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the cross entropies of start and end, summed over the batch."""
        return F.cross_entropy(halves(f), y.flatten().long(), reduction="sum")

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the exact root: columns of the start, then of the end, see `softmax_root`.

        Returns:
            Columns ``(2 · (tokens − 1), batch, 2 · tokens)``.

        Raises:
            ValueError: If the columns of the batch would fill the memory.
        """
        columns = self.n_columns(f.shape[-1])
        if columns * f.numel() > LARGEST_ROOT:
            raise ValueError(
                f"the exact curvature of texts of {f.shape[-1] // 2} tokens takes {columns} "
                "backward passes, too many to prepare at once: use smaller batches, or keep "
                "stochastic=True and raise `num_samples`"
            )
        start, end = (softmax_root(half) for half in f.chunk(2, dim=-1))
        return torch.cat([F.pad(start, (0, end.shape[-1])), F.pad(end, (start.shape[-1], 0))])

    def sampled_root(self, f: Tensor, num_samples: int, y: Tensor) -> Tensor:
        """Return a Monte-Carlo root: a start and an end are drawn independently for a column."""
        return joined(sampled_softmax_root(halves(f), num_samples))

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """Return ``softmax(f) − onehot(y)`` of start and end, ``(1, batch, 2 · tokens)``."""
        return joined(softmax_residual(halves(f), y.flatten()))

    def n_columns(self, outputs: int) -> int:
        """Return ``outputs − 2``: one fewer than there are tokens, for start and end."""
        return outputs - 2

    def readout(self, x: Any, pairs: bool = False, contrasts: bool = False) -> Readout:
        """Return the logits: samples of them are predicted from."""
        return LOGITS

    def scoring(self, link: Link, noise: float) -> Scoring:
        """Raise `ValueError`: there are too many outputs."""
        raise ValueError(self.jacobian_refusal)


def halves(f: Tensor) -> Tensor:
    """Return start and end as rows of their own, the two of an example together.

    Args:
        f: Shape ``(…, batch, 2 · tokens)``.

    Returns:
        Shape ``(…, 2 · batch, tokens)``.
    """
    rows: Tensor = f.unflatten(-1, (2, -1)).flatten(-3, -2)
    return rows


def joined(rows: Tensor) -> Tensor:
    """Return start and end side by side again, see `halves`."""
    f: Tensor = rows.unflatten(-2, (-1, 2)).flatten(-2)
    return f


def span_labels(batch: Any, labels: Tensor) -> Tensor:
    """Return labels, and refuse those that are no answers.

    Args:
        batch: What the model takes.
        labels: First and last token of each answer, ``(batch, 2)``.

    Raises:
        TypeError: If the batch is no mapping of texts.
        ValueError: If there are not two integers for each text, or they are no real tokens in
            order.
    """
    real = text_tokens(batch).to(labels.device)
    texts, tokens = real.shape
    if labels.shape != (texts, 2) or labels.is_floating_point():
        raise ValueError(
            f"question answering needs the first and the last token of each answer, integers of "
            f"shape ({texts}, 2); got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.long()
    inside = (labels >= 0) & (labels < tokens)
    inside &= real.gather(1, labels.clamp(0, tokens - 1))
    bad = ~inside.all(1) | (labels[:, 0] > labels[:, 1])
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"the answer of row {row}, tokens {labels[row].tolist()}, is no part of its text; "
            "questions without an answer, or with one that was cut off, have the first real token "
            "as both"
        )
    return labels
