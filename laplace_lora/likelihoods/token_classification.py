"""Token classification: one label per token, a softmax over the classes at each of them.

Outputs are logits of the tokens that count, ``(counted, classes)``, texts one after the other;
labels are ``(batch, tokens)``, `IGNORED` where nothing is labelled. An example is a text: its
likelihood is the product over its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.classification import Classification
from laplace_lora.likelihoods.language_modeling import IGNORED, LabelledTokens
from laplace_lora.likelihoods.real_tokens import real_tokens_of
from laplace_lora.likelihoods.roots import LARGEST_ROOT
from laplace_lora.likelihoods.splitting import split_mapping_or_pair

TOKENS = ("input_ids", "inputs_embeds")
real_tokens = partial(real_tokens_of, task="token classification", keys=TOKENS)


class TokenClassification(LabelledTokens, Classification):
    """The likelihood ``y_t ~ softmax(f_t)`` of every token that has a label."""

    name = "token_classification"
    jacobian_refusal: str | None = (
        "a token classifier has outputs at every token, and their Jacobians are never needed all "
        "at once: `la(batch)` and `la.predict(data)` predict every token. Tune the prior with "
        "method='widest' or 'marglik', and `calibrate` the width on validation labels"
    )

    def check_outputs(self, outputs: int | None) -> None:
        """Refuse a model with a single output.

        Raises:
            ValueError: If there is only one.
        """
        if outputs == 1:
            raise ValueError(
                "token classification needs two classes or more, this model has one output; load "
                "it with num_labels=2"
            )

    def split(
        self, batch: Any, label_key: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Tensor]:
        """Split a batch into texts, with the labels that count, and these labels."""
        x, y = split_mapping_or_pair(batch, label_key, device)
        y = class_labels(x, y)
        return marked(x, y, label_key), y

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the exact root, see `LabelledTokens.root`.

        Raises:
            ValueError: If the columns of the batch would fill the memory.
        """
        most, classes = int((y != IGNORED).sum(1).max()), f.shape[-1]
        passes = most * (classes - 1)
        if passes * f.numel() > LARGEST_ROOT:
            raise ValueError(
                f"the exact curvature of this batch takes {passes} backward passes, "
                f"{classes - 1} for each of {most} tokens, too many to prepare at once: use "
                "smaller batches, or keep stochastic=True and raise `num_samples`"
            )
        return super().root(f, y)


def marked(x: Mapping[str, Any], labels: Tensor, label_key: str) -> dict[str, Any]:
    """Return texts with labels that say which of their tokens count.

    Args:
        x: What the model takes.
        labels: `IGNORED` where a token does not count, ``(batch, tokens)``.
        label_key: Where the user's labels are, which are left out.
    """
    return {**{k: v for k, v in x.items() if k != label_key}, "labels": labels}


def class_labels(batch: Any, labels: Tensor) -> Tensor:
    """Return the labels that count, `IGNORED` everywhere else: those of real tokens.

    Args:
        batch: What the model takes: a mapping with ``input_ids`` (or ``inputs_embeds``) and, if
            anything is padded, ``attention_mask``.
        labels: As Hugging Face's collators make them, ``(batch, tokens)``.

    Returns:
        Shape ``(batch, tokens)``.

    Raises:
        TypeError: If the batch is not such a mapping.
        ValueError: If the labels are not one integer per token.
    """
    real = real_tokens(batch).to(labels.device)
    if labels.shape != real.shape or labels.is_floating_point():
        raise ValueError(
            f"token classification needs one integer label per token, shape {tuple(real.shape)}, "
            f"{IGNORED} where there is none; got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return labels.long().masked_fill(~real, IGNORED)
