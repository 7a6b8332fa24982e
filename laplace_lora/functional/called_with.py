"""The attention masks that a user calls a model with."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping
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
NOTED = (*MASK_NAMES, *INPUTS, *DECODER_INPUTS)


class CalledMasks:
    """The masks that a model was called with, or the transformers inside it.

    A module of one's own may have another name for the mask, or a function may call the model
    without PEFT's wrapper.

    Args:
        model: Any module.
        on_input: Registers a pre-hook, as `OwnHooks.on_input`.
        needed: Whether the masks are known from nowhere else.

    Attributes:
        masks: Of the latest calls since `begin`, see `mask_notes`; the model's own first.
        config: The configuration of the transformer, ``None`` if there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        on_input: Callable[[nn.Module, Note], None],
        needed: Callable[[], bool] = lambda: True,
    ) -> None:
        outer: dict[str, Any] = {}
        inner: dict[str, Any] = {}
        self.masks: MutableMapping[str, Any] = ChainMap(outer, inner)
        self.config: Any = getattr(base_of(model), "config", None)
        self._needed = needed
        self._outer, self._inner = outer, inner
        self._texts: list[tuple[Tensor, Any]] = []
        self._seen: dict[int, Tensor | None] = {}
        self._differ = False
        note = mask_notes(outer, unwrapped(model), needed)
        on_input(model, partial(self._note, note, outer, id(model)))
        for transformer, wrapper in _transformers(model):
            self.config = self.config or transformer.config
            for module in {wrapper, unwrapped(wrapper), transformer} - {model}:
                note = mask_notes(inner, unwrapped(module), self._is_needed)
                on_input(module, partial(self._note, note, inner, id(module)))
            embedding = _embedding(transformer)
            if embedding is not None:
                on_input(embedding, partial(self._note_text, transformer.config))

    def begin(self) -> None:
        """Forget all calls, before those for another batch."""
        self._outer.clear()
        self._inner.clear()
        self._texts.clear()
        self._seen.clear()
        self._differ = False

    def check(self, name: str, x: Tensor) -> None:
        """Refuse a layer of whose tokens it is not known which are real.

        Args:
            name: Of the layer, for the message.
            x: Its input, ``(batch, …, q)``.

        Raises:
            ValueError: If calls differ in their masks, or a transformer has read a text with the
                padding token, or without one that is known, in no call of `masks`.
        """
        if x.ndim < 3 or x.shape[1:-1].numel() < 2 or not self._needed():
            return
        if self._differ:
            raise ValueError(
                f"the model was called several times for a batch, with different attention masks, "
                f"and it is not known which is that of layer {name!r}; call it once, or pass "
                "`attention_mask` (hooks: `masks`)"
            )
        if any(key in self.masks for key in NOTED):
            return
        for ids, config in self._texts:
            pad = padding_token(config)
            if pad is None or bool((ids == pad).any()):
                raise ValueError(
                    f"it is not known which tokens of layer {name!r} are real: the text was read "
                    "by a part of the model, in no call of the whole that names `attention_mask`; "
                    "pass `attention_mask`, a function from a batch to its mask (hooks: `masks`)"
                )

    def _is_needed(self) -> bool:
        return self._needed() and self._outer.get(MASK_NAMES[0]) is None

    def _note(
        self,
        note: Note,
        masks: Mapping[str, Any],
        number: int,  # of the module, by which torch.compile can follow
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        note(args, kwargs)
        if any(key in masks for key in NOTED):
            mask = masks.get(MASK_NAMES[0])
            self._differ |= not _equal(self._seen.setdefault(number, mask), mask)

    def _note_text(self, config: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input")
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.ndim > 1:
            self._texts.append((ids, config))


def _transformers(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """Yield the outermost of transformers' models that take masks, and each with its wrappers."""
    base = base_of(model)
    if hasattr(type(base), "main_input_name") and MASK_NAMES[0] in Signature(base).names:
        yield base, model
        return
    for child in model.children():
        yield from _transformers(child)


def _embedding(transformer: Any) -> nn.Module | None:
    try:
        found = transformer.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _equal(mask: object, other: object) -> bool:
    if not isinstance(mask, Tensor) or not isinstance(other, Tensor):
        return mask is other
    return mask is other or (mask.shape == other.shape and torch.equal(mask, other))


class ModelCalls:
    """A model's calls until the handles are removed: whether one runs, and its masks.

    Args:
        model: Any module.

    Attributes:
        handles: Of the hooks that watch it.
        masks: Of the latest call, see `CalledMasks`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._runs = False
        self.handles = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self._called = CalledMasks(model, self._watch)
        self.masks = self._called.masks

    def check(self, name: str, x: Tensor) -> None:
        """Refuse a layer whose masks nobody knows.

        Args:
            name: Of the layer, for the message.
            x: Its input.

        Raises:
            RuntimeError: If no call of the model runs.
            ValueError: See `CalledMasks.check`.
        """
        if not self._runs:
            raise RuntimeError(
                f"{name!r} ran outside a call of the {type(self._model).__name__} that hooks were "
                "registered on, so the attention mask is not known; call that model, register the "
                "hooks on the one that you call, or pass `masks`"
            )
        self._called.check(name, x)

    def _watch(self, module: nn.Module, note: Note) -> None:
        hook = module.register_forward_pre_hook(lambda _, *given: note(*given), with_kwargs=True)
        self.handles.append(hook)

    def _before(self, module: nn.Module, args: Any) -> None:
        self._runs = True
        self._called.begin()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._runs = False


def mask_notes(
    masks: dict[str, Any], model: nn.Module, needed: Callable[[], bool] = lambda: True
) -> Note:
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
