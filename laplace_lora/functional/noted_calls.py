"""What a module notes of its calls: the attention masks, and the texts that they are about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.capture.arguments import Signature
from laplace_lora.capture.places import stacks
from laplace_lora.data.masks import DECODER_INPUTS, INPUTS, MASK_NAMES, UNCLEAR
from laplace_lora.data.sharding import unwrapped
from laplace_lora.models.inputs.unmasked import padding_token
from laplace_lora.models.wrapped_model import base_of

Note = Callable[[Any, dict[str, Any]], None]  # from positional and keyword arguments of a call
OnInput = Callable[[nn.Module, Note], None]
NOTED = (*MASK_NAMES, *INPUTS, *DECODER_INPUTS)


class NotedCalls:
    """The masks of a module's latest call, and whether its calls differ in them.

    Args:
        modules: The module and its wrappers, any of which may be called.
        on_input: Registers a pre-hook, as `OwnHooks.on_input`.
        needed: Whether the masks are known from nowhere else.

    Attributes:
        masks: Of the latest call since `forget`, see `mask_notes`.
        differ: Whether calls since then had different masks.
    """

    def __init__(
        self, modules: set[nn.Module], on_input: OnInput, needed: Callable[[], bool]
    ) -> None:
        self.masks: dict[str, Any] = {}
        self.differ = False
        self._seen: dict[int, Tensor | None] = {}
        for module in modules:
            note = mask_notes(self.masks, unwrapped(module), needed)
            on_input(module, partial(self._note, note, id(module)))

    def forget(self) -> None:
        """Forget all calls."""
        self.masks.clear()
        self.differ = False
        self._seen.clear()

    @property
    def is_padded(self) -> bool:
        """Whether a mask of the latest call says that there is padding."""
        return any(isinstance(mask, Tensor) and not bool(mask.all()) for mask in self._masks)

    def has_rows(self, n: int) -> bool:
        """Return whether a mask has as many tokens, over all examples."""
        masks = [mask for mask in self._masks if isinstance(mask, Tensor)]
        return any(mask.numel() == n != len(mask) for mask in masks)

    def agrees(self, other: NotedCalls) -> bool:
        """Return whether the latest calls of two modules have the same masks."""
        return all(map(_equal, self._masks, other._masks))

    @property
    def _masks(self) -> list[Any]:
        return [self.masks.get(name) for name in MASK_NAMES]

    def _note(
        self,
        note: Note,
        number: int,  # of the module, by which torch.compile can follow
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        note(args, kwargs)
        if any(key in self.masks for key in NOTED):
            mask = self.masks.get(MASK_NAMES[0])
            self.differ |= not _equal(self._seen.setdefault(number, mask), mask)


class NotedTransformer(NotedCalls):
    """The calls of a transformer, and the texts that it reads.

    Args:
        transformer: One of transformers' models.
        wrapper: What is around it, or itself.
        model: The whole model, whose own calls are noted elsewhere.
        on_input: Registers a pre-hook, as `OwnHooks.on_input`.
        needed: Whether the masks are known from nowhere else.

    Attributes:
        modules: All inside the wrapper.
        config: The transformer's.
        sees_images: Whether it reads images alone, which other inputs' masks say nothing about.
    """

    def __init__(
        self,
        transformer: Any,
        wrapper: nn.Module,
        model: nn.Module,
        on_input: OnInput,
        needed: Callable[[], bool],
    ) -> None:
        super().__init__({wrapper, unwrapped(wrapper), transformer} - {model}, on_input, needed)
        self.modules = set(wrapper.modules())
        self.config = transformer.config
        names = Signature(transformer).names
        reads_text = not {*INPUTS, *DECODER_INPUTS}.isdisjoint(names)
        self.sees_images = transformer.main_input_name.startswith("pixel_values") and not reads_text
        self._texts: list[Tensor] = []
        embedding = _embedding(transformer)
        if embedding is not None:
            on_input(embedding, self._note_text)

    def forget(self) -> None:
        """Forget all calls and texts."""
        super().forget()
        self._texts.clear()

    @property
    def may_have_padding(self) -> bool:
        """Whether a text has the padding token, or it is not known which that is."""
        pad = padding_token(self.config)
        return any(pad is None or bool((ids == pad).any()) for ids in self._texts)

    def _note_text(self, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input")
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.ndim > 1:
            self._texts.append(ids)


def transformers(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """Yield the outermost of transformers' models that take masks, and each with its wrappers."""
    base = base_of(model)
    if hasattr(type(base), "main_input_name") and MASK_NAMES[0] in Signature(base).names:
        yield base, model
        return
    for child in model.children():
        yield from transformers(child)


def _embedding(transformer: Any) -> nn.Module | None:
    try:
        found = transformer.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _equal(mask: object, other: object) -> bool:
    if not isinstance(mask, Tensor) or not isinstance(other, Tensor):
        return mask is other
    return mask is other or (mask.shape == other.shape and torch.equal(mask, other))


def mask_notes(masks: dict[str, Any], model: nn.Module, needed: Callable[[], bool]) -> Note:
    """Return what stores the masks of a model's latest call in ``masks``.

    The texts are stored beside them: without a mask the model reads all of them.

    Args:
        masks: Filled anew with each call.
        model: The model that is called: by position, by name, or with a whole batch.
        needed: Whether the masks are known from nowhere else.

    Returns:
        From positional and keyword arguments of a call. Raises `ValueError` if there is no mask,
        but positional arguments without names, any of which may be one.
    """
    signature = Signature(model)
    shifts_labels = stacks(model) is not None  # where nothing else is given as the decoder's text

    def note(args: Any, kwargs: dict[str, Any]) -> None:
        batch = next((x for x in args if isinstance(x, Mapping)), {})
        named = {**batch, **signature.named(args, kwargs)}
        masks.clear()
        masks.update({k: v for k, v in named.items() if v is not None and _is_noted(k)})
        labels = named.get("labels")
        if shifts_labels and masks.keys().isdisjoint(DECODER_INPUTS) and _are_tokens(labels):
            masks[DECODER_INPUTS[0]] = labels
        # The first argument is the text, whatever its name.
        nameless = args[max(1, len(signature.names)) :]
        unknown = [x for x in nameless if isinstance(x, Tensor) and x.ndim > 1]
        if unknown and masks.get(MASK_NAMES[0]) is None and needed():
            raise ValueError(
                f"{type(model).__name__} was called with {len(unknown)} positional arguments to "
                "which its forward pass gives no names, and any of them may be the attention "
                "mask; pass it by name, attention_mask=..."
            )

    return note


def _is_noted(key: object) -> bool:
    return key in (*NOTED, *UNCLEAR) or str(key).endswith("padding_mask")


def _are_tokens(labels: object) -> bool:
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
