"""Language modelling: the likelihood of a text is the product over its scored tokens.

Outputs are logits of the vocabulary, one row per scored token, ``(scored, vocabulary)``, texts one
after the other; labels are ``(batch, tokens)``, `IGNORED` where nothing is scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import Likelihood, Readout, Scoring
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.real_tokens import real_tokens_of
from laplace_lora.likelihoods.roots import (
    cross_entropy,
    sampled_softmax_root,
    softmax_residual,
    softmax_root,
    standing_apart,
)
from laplace_lora.likelihoods.splitting import split_mapping_or_pair

IGNORED = -100  # the label of tokens that are not scored
EXACT_VOCABULARY = 1024  # tokens up to which the exact root may be asked for


class LabelledTokens(Likelihood):
    """A likelihood of texts, the product over their tokens that have a label."""

    rows_are_tokens = True
    samples_labels = True

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the cross entropy, summed over the labelled tokens."""
        y = y[y != IGNORED]
        return cross_entropy(f, y) if len(y) else f.sum()

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the exact root, with columns of its own for every token of an example.

        The tokens of an example meet in one gradient; a token of another example may share their
        columns. Labels drawn independently need no such care: the cross terms of
        `sampled_softmax_root` vanish on average.

        Returns:
            Columns ``(most labelled tokens of an example · (classes − 1), labelled, classes)``.
        """
        labelled = y != IGNORED
        counts = labelled.cumsum(1)
        most = max(int(counts.max()), 1)  # a batch may have no label
        return standing_apart(softmax_root(f), (counts - 1)[labelled], most)

    def sampled_root(self, f: Tensor, num_samples: int, y: Tensor) -> Tensor:
        """Return a Monte-Carlo root with labels drawn for every token."""
        return sampled_softmax_root(f, num_samples)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """Return ``softmax(f) − onehot(y)`` of the labelled tokens, ``(1, labelled, classes)``."""
        return softmax_residual(f, y[y != IGNORED])

    def residual_weights(self, root: Tensor, f: Tensor, y: Tensor) -> Tensor | None:
        """Return ``None``: a text's tokens have weights of their own, and columns are by text."""
        return None


class LanguageModeling(LabelledTokens):
    """The likelihood of texts under a model of their next tokens."""

    name = "language_modeling"
    laplace_name = "classification"  # laplace-torch does not know texts; to it tokens are classes
    predicts_tokens = True
    jacobian_refusal: str | None = (
        "a language model's outputs, its whole vocabulary at every token, are too many for "
        "Jacobians; `laplace_lora.generation` predicts the likeliest tokens, and method='marglik' "
        "tunes the prior without predictions"
    )

    def split(
        self, batch: Any, label_key: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Tensor]:
        """Split a batch into texts, with the labels that count, and these labels."""
        x, y = split_mapping_or_pair(batch, label_key, device)
        y = token_labels(x, y)
        return {**x, "labels": y}, y

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the exact root of a small vocabulary, see `LabelledTokens.root`.

        Raises:
            ValueError: If the vocabulary has more than `EXACT_VOCABULARY` tokens.
        """
        if f.shape[-1] > EXACT_VOCABULARY:
            raise ValueError(
                f"the exact curvature needs {f.shape[-1] - 1} backward passes per token; keep "
                "stochastic=True, and raise `num_samples` for more precision"
            )
        return super().root(f, y)

    def readout(self, x: Any, pairs: bool = False, contrasts: bool = False) -> Readout:
        """Raise `ValueError`: texts have many tokens."""
        raise ValueError(
            "a language model's posterior predicts tokens through `laplace_lora.generation`: "
            "`score(la, batch)` or `generate(la, inputs)`"
        )

    def scoring(self, link: Link, noise: float) -> Scoring:
        """Raise `ValueError`: texts have many tokens."""
        raise ValueError(self.jacobian_refusal)


def token_labels(batch: Any, labels: Tensor) -> Tensor:
    """Return the labels that count, `IGNORED` everywhere else.

    A label counts if it is not `IGNORED` and both its token and the token before it, which
    predicts it, are real; so padding on either side changes nothing.

    Args:
        batch: What the model takes: a mapping with ``input_ids`` and, if anything is padded,
            ``attention_mask``.
        labels: As Hugging Face's collators make them, ``(batch, tokens)``: not shifted.

    Returns:
        Shape ``(batch, tokens)``.

    Raises:
        TypeError: If the batch is not such a mapping of tensors.
        ValueError: If the labels are not one integer per token, nor the mask one entry.
    """
    real, ids = real_tokens_of(batch, "language modelling"), batch["input_ids"]
    if labels.shape != ids.shape or labels.is_floating_point():
        raise ValueError(
            f"language modelling needs one integer label per token, shape {tuple(ids.shape)}; got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    predicted = real.to(labels.device).clone()
    predicted[:, 1:] &= predicted[:, :-1].clone()
    predicted[:, 0] = False
    return labels.long().masked_fill(~predicted, IGNORED)
