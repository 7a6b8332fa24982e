"""Run a classifying decoder's head at the one token whose logits the model keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from laplace_lora.models.changes.narrowing import last_true, one_token
from laplace_lora.models.changes.thread_hooks import own_hooks
from laplace_lora.models.inputs.unmasked import IDS, MASK, padding_token

EMBEDDED = "inputs_embeds"

_narrowed: ContextVar[tuple[nn.Module, ...]] = ContextVar("heads that see one token", default=())


@contextmanager
def score_head_narrowed(base: Any, inputs: Any) -> Iterator[None]:
    """Let the head of transformers' ``…ForSequenceClassification`` decoders see one token.

    Other models run as they are.

    Args:
        base: The transformer.
        inputs: What it is called with, for those that call it without its hooks, as AdaLoRA does;
            only a mapping tells.

    Raises:
        ValueError: If the inputs are not known, or the token that such a decoder picks is padding;
            raised when it runs.
    """
    head = _score_head(base)
    if head is None or head in _narrowed.get():
        yield
        return
    # The decoder picks the token by the ids that it receives itself. Prompt tuning hands it
    # embeddings instead, of a longer text. Picked before the decoder runs, as the check waits for
    # what a device has been given to do.
    picked: list[Tensor | None] = []

    def note(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get(IDS, args[0] if args else None)
        picked[:] = [_checked_token(ids, kwargs.get(MASK), base.config)]

    def position() -> Tensor | None:
        if not picked:
            if not isinstance(inputs, Mapping) or inputs.keys().isdisjoint((IDS, EMBEDDED)):
                raise ValueError(
                    f"it is not known what {type(base).__name__} is called with, and so not at "
                    "which token it classifies; give the batches as mappings"
                )
            note((), inputs)
        return picked[0]

    before = _narrowed.get()
    try:
        _narrowed.set((*before, head))
        with own_hooks() as hooks, one_token(head, position, keep_length=True):
            hooks.on_input(base, note)
            yield
    finally:
        _narrowed.set(before)


def last_unpadded(input_ids: Tensor | None, config: Any) -> Tensor | None:
    """Return the token at which transformers' decoders classify: the last that is not padding.

    ``None`` for the last of all, which they take where there are no ids.
    """
    pad = padding_token(config)
    return None if pad is None or input_ids is None else last_true(input_ids != pad)


def _checked_token(ids: Tensor | None, mask: Any, config: Any) -> Tensor | None:
    """Return `last_unpadded`, unless the mask says that it is padding of a text with other tokens.

    Raises:
        ValueError: If it does.
    """
    position = last_unpadded(ids, config)
    if position is None or ids is None or getattr(mask, "shape", None) != ids.shape:
        return position
    real = mask != 0
    if bool((~real.gather(1, position.unsqueeze(1)) & real.any(1, keepdim=True)).any()):
        raise ValueError(
            "the model would classify a text at one of its padding tokens: it looks for the last "
            f"token other than config.pad_token_id, {padding_token(config)}, and "
            "texts are padded with another; set model.config.pad_token_id = tokenizer.pad_token_id"
        )
    return position


def _score_head(base: Any) -> nn.Module | None:
    decoder = not getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    classifier = type(base).__name__.endswith("ForSequenceClassification")
    return getattr(base, "score", None) if classifier and decoder else None
