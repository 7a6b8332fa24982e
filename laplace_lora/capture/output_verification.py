"""Verify a model's outputs for a batch against single examples and its own forward pass.

What is inferred about a model is checked: that examples do not mix, at which positions a decoder
reads its tokens, that a head may be run at one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.capture.padding_verification import is_padded, verify_padding, without_padding
from laplace_lora.data.batches import one_example
from laplace_lora.data.pairs import passes
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.inputs.image_rows import divides, has_images
from laplace_lora.models.inputs.positions import holds_joined_texts
from laplace_lora.models.inputs.unmasked import apparent_mask
from laplace_lora.models.tolerances import distance, near

JOINED = {"input_ids", "position_ids", "labels", "token_type_ids"}  # of texts in one row
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
    one with the fewest; of a padded one also a pass without its padding, see `verify_padding`.
    Where a batch cannot be split, as images of several sizes in one tensor cannot, the whole is
    compared with the model's own pass.

    Args:
        model: From a batch to outputs; `LogitsModel` says how its transformer answers by itself.
        batch: What the model takes.
        output: Its outputs, ``(rows, outputs)``.
        examples: Number of examples.
        dtype: The coarsest in which the model computes.
        by_token: Whether an example has a row of the output for each of its tokens that counts.

    Warns if the model itself answers otherwise without an example's padding, or without the texts
    that are joined with one in its row; or if an encoder-decoder does not answer yet where answers
    are read, which costs it another forward pass.

    Raises:
        RuntimeError: If the outputs differ.
        ValueError: If they are others without padding of which no mask says so.
    """
    own, source = _own_logits(model)
    config = getattr(source, "config", None)
    batch = getattr(source, "named", lambda ids: ids)(batch)
    with torch.no_grad():
        getattr(source, "check_first_step", lambda batch: None)(batch)
        if by_token:
            _warn_if_joined_texts_meet(own, batch, dtype)
        chosen = chosen_examples(batch, examples, config)
        tried = {0, *chosen}
        if not divides(batch, config, examples) or not _can_be_divided(model, batch, tried):
            whole = own(batch)
            if whole is not None and not near(whole, output, dtype):
                raise RuntimeError(_positions(whole, output))
            return
        if by_token and is_padded(single := one_example(batch, chosen[-1]), config):
            verify_padding(own, single, model(single), dtype, config)
        # Which rows are an example's is known for the first one only, where rows are tokens.
        for n in [0] if by_token else chosen:
            single = one_example(batch, n)
            rows = slice(None) if by_token else slice(n, n + 1)
            alone = own(single)
            if alone is not None and near(alone, output[rows][: len(alone)], dtype):
                if n == chosen[-1] and not by_token:
                    verify_padding(own, single, output[rows], dtype, config)
                continue
            ours = model(single)
            expected = output[rows][: len(ours)]
            if not near(ours, expected, dtype):
                again = model(single)
                if not near(again, ours, dtype):
                    raise RuntimeError(
                        "the model's outputs are random: the same example has others each time "
                        f"({distance(again, ours)}); switch off what it draws at random"
                    )
                raise RuntimeError(
                    f"the model mixes the examples of a batch: alone, example {n} has other "
                    f"outputs ({distance(ours, expected)}), so they depend on the batch. "
                    "Switch dropout off, and replace layers that use statistics of the batch, "
                    "such as batch norms without running statistics"
                )
            if alone is None:
                continue
            bare = own(without_padding(single))
            if bare is not None and not near(bare, expected, dtype):
                raise RuntimeError(_positions(alone, expected))


def _can_be_divided(model: Any, batch: Any, tried: Iterable[int]) -> bool:
    """Return whether texts run with a row of the images each, by trying some.

    Two of one text and none of another are as many rows, and not every configuration tells.
    """
    if not has_images(batch):
        return True
    try:
        for n in tried:
            model(one_example(batch, n))
    except (IndexError, RuntimeError, ValueError):
        return False  # the batch itself has run
    return True


def _warn_if_joined_texts_meet(
    own: Callable[[Any], Tensor | None], batch: Any, dtype: torch.dtype
) -> None:
    """Warn where a text has other logits alone than behind the texts that share its row."""
    texts = {key: value[:1] for key, value in batch.items() if key in JOINED}
    mask = batch.get("attention_mask")
    has_padding = mask is not None and not bool(mask.all())  # positions stand still at padding
    if has_padding or "labels" not in texts or not holds_joined_texts(texts):
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
            f"logits ({distance(together[-len(alone) :], alone)}). Trained with kernels that keep "
            "such texts apart it is another function here; pad the texts instead"
        )


def _own_logits(model: Any) -> tuple[Callable[[Any], Tensor | None], Any]:
    """Return what gives the logits of the transformer by itself, and the `LogitsModel` around it.

    The latter is ``None`` for a model that does not say.
    """
    for part in (model, getattr(model, "model", None)):  # laplace-torch wraps last layers
        if hasattr(part, OWN):
            own: Callable[[Any], Tensor | None] = getattr(part, OWN)
            return own, getattr(part, "source", part)
    return lambda batch: None, None


def chosen_examples(batch: Any, examples: int, config: Any = None) -> list[int]:
    """Return the examples with the most and the fewest real tokens, in all of their texts.

    Args:
        batch: What the model takes.
        examples: Number of examples.
        config: The transformer's configuration, which tells padding where there is no mask.
    """
    texts = passes(batch) if isinstance(batch, Mapping) else []
    masks = [mask for text in texts if (mask := apparent_mask(text, config)) is not None]
    if not masks or any(mask.ndim < 2 or len(mask) != examples for mask in masks):
        return [0]
    lengths = torch.stack([(mask != 0).flatten(1).sum(1) for mask in masks]).sum(0)
    return list(dict.fromkeys([int(lengths.argmax()), int(lengths.argmin())]))


def _positions(theirs: Tensor, ours: Tensor) -> str:
    return (
        "the logits differ from those of the model's own forward pass ("
        f"{distance(theirs, ours)}): the model counts or reads its tokens in "
        "another way than LogitsModel expects. Give the batches `position_ids`, or LogitsModel "
        "an `output` callable"
    )
