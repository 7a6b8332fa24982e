"""The attention masks that a user calls a model with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laplace_lora.capture.arguments import Signature
from laplace_lora.capture.places import stacks
from laplace_lora.data.masks import DECODER_INPUTS, INPUTS, MASK_NAMES
from laplace_lora.data.sharding import unwrapped

NOTED = (*MASK_NAMES, INPUTS[0], *DECODER_INPUTS)


class ModelCalls:
    """A model's calls while this is registered: whether one runs, and the masks of the latest.

    Attributes:
        masks: Of the latest call, see `mask_notes`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.masks: dict[str, Any] = {}
        self._model = model
        self._runs = False
        self._note = mask_notes(self.masks, unwrapped(model))

    def register(self) -> list[RemovableHandle]:
        """Watch the model until the handles are removed."""
        model = self._model
        return [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def check(self, name: str) -> None:
        """Refuse a layer that runs in no call of the model, whose masks nobody knows.

        Args:
            name: Of the layer, for the message.

        Raises:
            RuntimeError: If none runs.
        """
        if not self._runs:
            raise RuntimeError(
                f"{name!r} ran outside a call of the {type(self._model).__name__} that hooks were "
                "registered on, so the attention mask is not known; call that model, register the "
                "hooks on the one that you call, or pass `masks`"
            )

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._runs = True
        self._note(args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._runs = False


def mask_notes(
    masks: dict[str, Any], model: nn.Module, needed: Callable[[], bool] = lambda: True
) -> Callable[[Any, dict[str, Any]], None]:
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
        masks.update({key: named[key] for key in NOTED if named.get(key) is not None})
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


def _are_tokens(labels: object) -> bool:
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
