"""Run a classifying decoder's head at the one token whose logits the model keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from laplace_lora.models.narrowing import last_true, one_token
from laplace_lora.models.thread_hooks import on_input


@contextmanager
def score_head_narrowed(base: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let the head of transformers' ``…ForSequenceClassification`` decoders see one token.

    Other models run as they are.

    Args:
        base: The transformer.
        inputs: What it is called with.
    """
    head = _score_head(base, inputs)
    if head is None:
        yield
        return
    # The decoder picks the token by the ids that it receives itself. Prompt tuning hands it
    # embeddings instead, of a longer text.
    received = {"input_ids": inputs["input_ids"]}

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received["input_ids"] = kwargs.get("input_ids", args[0] if args else None)

    def position() -> Tensor | None:
        return last_unpadded(received["input_ids"], base.config)

    handle = on_input(base, note)
    try:
        with one_token(head, position, keep_length=True):
            yield
    finally:
        handle.remove()


def last_unpadded(input_ids: Tensor | None, config: Any) -> Tensor | None:
    """Return the token at which transformers' decoders classify: the last that is not padding.

    ``None`` for the last of all, which they take where there are no ids.
    """
    pad = config.get_text_config().pad_token_id
    return None if pad is None or input_ids is None else last_true(input_ids != pad)


def _score_head(base: Any, inputs: Mapping[str, Any]) -> nn.Module | None:
    decoder = not getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    classifier = type(base).__name__.endswith("ForSequenceClassification")
    known = classifier and decoder and "input_ids" in inputs
    return getattr(base, "score", None) if known else None
