"""The attention masks that a user calls a model with."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from laplace_lora.data.masks import MASK_NAMES
from laplace_lora.data.sharding import unwrapped
from laplace_lora.functional.noted_calls import (
    NOTED,
    Note,
    NotedCalls,
    NotedTransformer,
    OnInput,
    transformers,
)
from laplace_lora.models.wrapped_model import base_of


class CalledMasks:
    """The masks that a model was called with, or the transformers inside it.

    A module of one's own may have another name for the mask, or a function may call the model
    without PEFT's wrapper. Where several transformers read texts, each has its own masks.

    Args:
        model: Any module.
        on_input: Registers a pre-hook, as `OwnHooks.on_input`.
        needed: Whether the masks are known from nowhere else.
    """

    def __init__(
        self,
        model: nn.Module,
        on_input: OnInput,
        needed: Callable[[], bool] = lambda: True,
    ) -> None:
        self._needed = needed
        self._config: Any = getattr(base_of(model), "config", None)
        self._outer = NotedCalls({model}, on_input, needed)
        self._inner = [
            NotedTransformer(transformer, wrapper, model, on_input, self._is_needed)
            for transformer, wrapper in transformers(model)
        ]
        self._of_text = [one for one in self._inner if not one.sees_images]
        self._modules = dict(unwrapped(model).named_modules(remove_duplicate=False))

    def begin(self) -> None:
        """Forget all calls, before those for another batch."""
        for calls in (self._outer, *self._inner):
            calls.forget()

    def of(self, name: str, given: Mapping[str, Any], is_sure: bool = False) -> Mapping[str, Any]:
        """Return the masks at whose tokens a layer may stand.

        Args:
            name: Of the layer.
            given: Masks that are known otherwise. They come before those of the calls, except where
                several transformers read texts: a batch's may be another's.
            is_sure: Whether those given are every text's all the same.

        Returns:
            From the names of masks and texts, see `mask_notes`.
        """
        return self._masks(self._around(name), given, is_sure)

    def _masks(
        self, around: list[NotedTransformer], given: Mapping[str, Any], is_sure: bool = False
    ) -> Mapping[str, Any]:
        if around and len(self._inner) > 1 and all(one.sees_images for one in around):
            return ChainMap(*(one.masks for one in around))
        noted = _noted(around)
        agreed = noted[0].masks if noted and all(map(noted[0].agrees, noted)) else {}
        if len(self._of_text) > 1 and len(around) == 1 and _are_of_tokens(agreed):
            return ChainMap(dict(given), agreed) if is_sure else agreed
        return ChainMap(dict(given), self._outer.masks, agreed)

    def config_of(self, name: str) -> Any:
        """Return the configuration of a layer's transformer, ``None`` if there is none."""
        if not self._inner or (self._config is not None and len(self._of_text) < 2):
            return self._config
        around = self._around(name)
        return (around if len(around) == 1 else self._inner)[0].config

    def check(self, name: str, x: Tensor, given: Mapping[str, Any] | None = None) -> None:
        """Refuse a layer of whose tokens it is not known which are real.

        Args:
            name: Of the layer, for the message.
            x: Its input, ``(batch, …, q)``.
            given: As for `of`.

        Raises:
            ValueError: If calls differ in their masks, or a transformer has read a text with the
                padding token, or without one that is known, in no call of `of`.
        """
        around = self._around(name)
        masks = self._masks(around, given or {})
        if masks.get(MASK_NAMES[0]) is None:
            self._check_agreement(name, x, around)
        if x.ndim < 3 or x.shape[1:-1].numel() < 2 or not self._needed():
            return
        if self._outer.differ or any(one.differ for one in around):
            raise ValueError(
                f"the model was called several times for a batch, with different attention masks, "
                f"and it is not known which is that of layer {name!r}; call it once, or pass "
                "`attention_mask` (hooks: `masks`)"
            )
        if any(key in masks for key in NOTED):
            return
        if any(one.may_have_padding for one in around):
            raise ValueError(
                f"it is not known which tokens of layer {name!r} are real: the text was read "
                "by a part of the model, in no call of the whole that names `attention_mask`; "
                "pass `attention_mask`, a function from a batch to its mask (hooks: `masks`)"
            )

    def _check_agreement(self, name: str, x: Tensor, around: list[NotedTransformer]) -> None:
        noted = _noted(around)
        padded = [one for one in noted if one.is_padded]
        if not padded or all(map(noted[0].agrees, noted)):
            return
        has_tokens = x.ndim > 2 and x.shape[1:-1].numel() > 1
        if has_tokens or any(one.has_rows(len(x)) for one in padded):
            raise ValueError(
                f"{len(noted)} transformers were called with different attention masks, and layer "
                f"{name!r} stands inside none of them, or in several; pass `attention_mask` "
                "(hooks: `masks`)"
            )

    def _around(self, name: str) -> list[NotedTransformer]:
        """Return the transformers that hold a layer, or all that read texts."""
        module = self._modules.get(name)
        return [one for one in self._inner if module in one.modules] or self._of_text

    def _is_needed(self) -> bool:
        return self._needed() and self._outer.masks.get(MASK_NAMES[0]) is None


def _noted(around: list[NotedTransformer]) -> list[NotedTransformer]:
    """Return those whose latest call had a mask or a text."""
    return [one for one in around if any(key in one.masks for key in NOTED)]


def _are_of_tokens(masks: Mapping[str, Any]) -> bool:
    """Return whether there are masks or texts, and no mask is of pairs of tokens."""
    return bool(masks) and all(getattr(masks.get(k), "ndim", 2) <= 3 for k in MASK_NAMES)


class ModelCalls:
    """A model's calls until the handles are removed: whether one runs, and its masks.

    Args:
        model: Any module.
        handles: Gets those of the hooks that watch it.

    Attributes:
        called: The masks of the latest call.
    """

    def __init__(self, model: nn.Module, handles: list[Any]) -> None:
        self._model = model
        self._runs = False
        self._handles = handles
        handles.append(model.register_forward_pre_hook(self._before))
        handles.append(model.register_forward_hook(self._after, always_call=True))
        self.called = CalledMasks(model, self._watch)

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
        self.called.check(name, x)

    def _watch(self, module: nn.Module, note: Note) -> None:
        hook = module.register_forward_pre_hook(lambda _, *given: note(*given), with_kwargs=True)
        self._handles.append(hook)

    def _before(self, module: nn.Module, args: Any) -> None:
        self._runs = True
        self.called.begin()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._runs = False
