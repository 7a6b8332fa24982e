"""Verify a model's outputs for a batch against single examples and its own forward pass.

What is inferred about a model is checked: that examples do not mix, at which positions a decoder
reads its tokens, that a head may be run at one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import one_example, splits_by_example
from laplace_lora.data.pairs import passes
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.inputs.positions import holds_joined_texts
from laplace_lora.models.tolerances import near

JOINED = {"input_ids", "position_ids", "labels", "token_type_ids"}  # of texts in one row
IMAGES = {"pixel_values", "pixel_values_videos"}
OWN = "own_logits"  # of a model that says how its transformer answers by itself


def verify_outputs(
    model: Any,
    batch: Any,
    output: Tensor,
    examples: int,
    dtype: torch.dtype,
    by_token: bool = False,
) -> None:
    """Compare outputs with those of single examples, and with the model's own forward pass.

    Costs two forward passes of one example each: of the one with the most real tokens and of the
    one with the fewest; of a padded one also a pass without its padding. Where a batch cannot be
    split, as images of several sizes in one tensor cannot, the whole is compared with the model's
    own pass.

    Args:
        model: From a batch to outputs; `LogitsModel` says how its transformer answers by itself.
        batch: What the model takes.
        output: Its outputs, ``(rows, outputs)``.
        examples: Number of examples.
        dtype: The coarsest in which the model computes.
        by_token: Whether an example has a row of the output for each of its tokens that counts.

    Warns if the model itself answers otherwise without an example's padding, or without the texts
    that are joined with one in its row.

    Raises:
        RuntimeError: If the outputs differ.
    """
    own = _own_logits(model)
    with torch.no_grad():
        if by_token:
            _warn_if_joined_texts_meet(own, batch, dtype)
        if not splits_by_example(batch, examples) or not _can_be_divided(model, batch):
            whole = own(batch)
            if whole is not None and not near(whole, output, dtype):
                raise RuntimeError(_positions(whole, output))
            return
        # Which rows are an example's is known for the first one only, where rows are tokens.
        for n in [0] if by_token else chosen_examples(batch, examples):
            single = one_example(batch, n)
            rows = slice(None) if by_token else slice(n, n + 1)
            alone = own(single)
            if alone is not None and near(alone, output[rows][: len(alone)], dtype):
                if not by_token:
                    _warn_if_padding_counts(own, single, alone, dtype)
                continue
            ours = model(single)
            expected = output[rows][: len(ours)]
            if not near(ours, expected, dtype):
                again = model(single)
                if not near(again, ours, dtype):
                    raise RuntimeError(
                        "the model's outputs are random: the same example has others each time "
                        f"({_distance(again, ours)}); switch off what it draws at random"
                    )
                raise RuntimeError(
                    f"the model mixes the examples of a batch: alone, example {n} has other "
                    f"outputs ({_distance(ours, expected)}), so they depend on the batch. "
                    "Switch dropout off, and replace layers that use statistics of the batch, "
                    "such as batch norms without running statistics"
                )
            if alone is None:
                continue
            bare = own(without_padding(single))
            if bare is not None and not near(bare, expected, dtype):
                raise RuntimeError(_positions(alone, expected))


def _can_be_divided(model: Any, batch: Any) -> bool:
    """Return whether images that are as many as texts are one of each text's, by trying the first.

    Two of one text and none of another are as many.
    """
    if not isinstance(batch, Mapping) or not IMAGES & batch.keys() or "input_ids" not in batch:
        return True
    try:
        model(one_example(batch, 0))
    except (IndexError, RuntimeError, ValueError):
        return False  # the batch itself has run
    return True


def _warn_if_joined_texts_meet(
    own: Callable[[Any], Tensor | None], batch: Any, dtype: torch.dtype
) -> None:
    """Warn where a text has other logits alone than behind the texts that share its row."""
    texts = {key: value[:1] for key, value in batch.items() if key in JOINED}
    if not holds_joined_texts(texts):
        return
    starts = (texts["position_ids"][0].diff() != 1).nonzero().flatten() + 1
    last = {key: value[:, int(starts[-1]) :].clone() for key, value in texts.items()}
    last["labels"][:, 0] = IGNORED
    together, alone = own(texts), own(last)
    if together is None or alone is None or not len(alone):
        return
    if not near(together[-len(alone) :], alone, dtype):
        warn(
            "the model reads the texts that are joined in one row together: alone, one has other "
            f"logits ({_distance(together[-len(alone) :], alone)}). Trained with kernels that keep "
            "such texts apart it is another function here; pad the texts instead"
        )


def _warn_if_padding_counts(
    own: Callable[[Any], Tensor | None], single: Any, alone: Tensor, dtype: torch.dtype
) -> None:
    """Warn where a model's own answer to an example is another without its padding."""
    bare = without_padding(single)
    if bare is single or bool(single["attention_mask"].all()):
        return
    answer = own(bare)
    if answer is not None and not near(answer, alone, dtype):
        warn(
            "the model itself answers a padded text otherwise than the text alone "
            f"({_distance(answer, alone)}), so numbers depend on the batch size. Models with "
            "learnt positions count padding before a text: pad on the right, or give the batches "
            "`position_ids`. Classifiers with prompts before the text, or given `inputs_embeds`, "
            "read the last token of all: pad on the left"
        )


def without_padding(batch: Any) -> Any:
    """Return a batch of one example without its padding, where it has a mask.

    What an encoder-decoder's decoder reads stays as it is.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != 1:
        return batch
    real = mask[0].bool()
    return {
        key: value[:, real] if _is_text(key, value, mask.shape) else value
        for key, value in batch.items()
    }


def _is_text(key: str, value: Any, shape: torch.Size) -> bool:
    """Return whether a value has an entry for each token; a decoder's text is another one."""
    if not isinstance(value, Tensor) or key.startswith(("decoder_", "pixel_")):
        return False
    return value.shape[: len(shape)] == shape


def _own_logits(model: Any) -> Callable[[Any], Tensor | None]:
    """Return what gives the logits of the transformer by itself, where a model says so."""
    for part in (model, getattr(model, "model", None)):  # laplace-torch wraps last layers
        if hasattr(part, OWN):
            own: Callable[[Any], Tensor | None] = getattr(part, OWN)
            return own
    return lambda batch: None


def chosen_examples(batch: Any, examples: int) -> list[int]:
    """Return the examples with the most and the fewest real tokens."""
    mask = passes(batch)[0].get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim < 2 or len(mask) != examples:
        return [0]
    lengths = (mask != 0).flatten(1).sum(1)
    return list(dict.fromkeys([int(lengths.argmax()), int(lengths.argmin())]))


def _distance(ours: Tensor, theirs: Tensor) -> str:
    """Return how far outputs are apart, relative to the largest."""
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} for {tuple(theirs.shape)}"
    error = float((ours.to(theirs) - theirs).abs().max() / theirs.abs().max())
    return f"{error:.1e} of the largest"


def _positions(theirs: Tensor, ours: Tensor) -> str:
    return (
        "the logits differ from those of the model's own forward pass ("
        f"{_distance(theirs, ours)}): the model counts or reads its tokens in "
        "another way than LogitsModel expects. Give the batches `position_ids`, or LogitsModel "
        "an `output` callable"
    )
