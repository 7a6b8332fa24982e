"""Batches that a model cannot read, refused before it fails at them by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace_lora.data.batches import is_empty
from laplace_lora.data.masks import MASK_NAMES

TOKENS = ("input_ids", "attention_mask")
CHOOSING = "ForMultipleChoice"  # how transformers' names of such models end
ADAPTERS = "adapter_names"  # PEFT's, one for each row
TOKENIZE = (
    "tokenize with padding=True, return_tensors='pt', or give the texts to "
    "la.predict(texts, tokenizer)"
)


def check_mapping(batch: Mapping[str, Any], model: str, is_strict: bool) -> None:
    """Refuse a mapping that is no batch for a model.

    Args:
        batch: What a collator made.
        model: The model's class.
        is_strict: Whether it is one of transformers' models; others may take what they like.

    Raises:
        TypeError: If tokens are lists or arrays, or there are no tensors at all.
        ValueError: If there are no examples, no tokens or no batch of them, a multiple-choice model
            gets anything but choices, or see `check_adapter`.
    """
    check_adapter(batch)
    for key in TOKENS:
        tokens = batch.get(key)
        if not isinstance(tokens, Tensor | None):
            raise TypeError(
                f"{key!r} of the batch is a {type(tokens).__name__}, no tensor; {TOKENIZE}"
            )
        if tokens is None:
            continue
        if not tokens.numel():
            raise ValueError(
                f"{key!r} of the batch has the shape {tuple(tokens.shape)}: there is nothing that "
                "the model could read; leave such batches out"
            )
        if tokens.ndim != 3 and model.endswith(CHOOSING):
            raise ValueError(
                f"{key!r} of the batch has the shape {tuple(tokens.shape)}, and {model} takes "
                "(questions, choices, tokens): tokenize a question with each of its choices, and "
                "give batches of questions, as transformers' DataCollatorForMultipleChoice makes "
                "them"
            )
        _check_dimensions(repr(key), tokens, is_strict)
    if is_strict and not any(isinstance(value, Tensor) for value in batch.values()):
        held = ", ".join(map(repr, batch)) or "nothing"
        raise TypeError(f"the batch has no tensors, but {held}; {TOKENIZE}")
    if is_empty(batch):
        raise ValueError("the batch has no examples; leave such batches out")


def check_has_texts(batch: Mapping[str, Any]) -> None:
    """Refuse rows of padding alone, of which a model would answer for a padding token.

    Looks at the masks before they go to the model's device, which need not be waited for then.

    Args:
        batch: The model's inputs; masks of choices pass, of which a question may have fewer.

    Raises:
        ValueError: If there are such rows; names the first of them.
    """
    for name in MASK_NAMES:
        mask = batch.get(name)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            continue
        is_real = (mask != 0).any(1)
        if not bool(is_real.all()):
            rows = (~is_real).nonzero().flatten().tolist()
            raise ValueError(
                f"rows {rows[:5]} of the batch have no real token: their {name!r} is zero "
                "everywhere, so there is no text after which, or about which, the model could "
                "answer; leave them out"
            )


def check_adapter(batch: Mapping[str, Any]) -> None:
    """Refuse inputs that choose an adapter, of which a posterior may know nothing.

    Rows of another adapter, or of none, would have its answer without any variance.

    Args:
        batch: A batch or a row.

    Raises:
        ValueError: If there are names of adapters.
    """
    names = batch.get(ADAPTERS)
    if names is not None:
        asked = sorted({names} if isinstance(names, str) else set(map(str, names)))
        raise ValueError(
            f"{ADAPTERS!r} asks for the adapters {asked}, and a posterior is of one, through which "
            "all rows run; leave it out, and give rows of other adapters to posteriors of these"
        )


def check_tensor(batch: Any, is_strict: bool) -> None:
    """Refuse what is neither a mapping nor a tensor with a row per example.

    Args:
        batch: What is no mapping.
        is_strict: As of `check_mapping`.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has no batch dimension.
    """
    if isinstance(batch, Tensor):
        _check_dimensions("the tensor", batch, is_strict)
        return
    is_text = isinstance(batch, str) or (
        isinstance(batch, list | tuple) and bool(batch) and isinstance(batch[0], str)
    )
    raise TypeError(
        f"the model takes a mapping of tensors or a tensor, got {type(batch).__name__}; "
        + ("texts go" if is_text else "texts, rows of a data set, pairs and loaders go")
        + " to la.predict(texts, tokenizer)"
    )


def _check_dimensions(name: str, tensor: Tensor, is_strict: bool) -> None:
    if tensor.ndim == 1 and is_strict:
        raise ValueError(
            f"{name} of the batch has the shape {tuple(tensor.shape)}, without a batch dimension: "
            "give a batch of one, as by tensor.unsqueeze(0), or rows as a list to la.predict(rows)"
        )
