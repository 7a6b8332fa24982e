"""`LateHead`: the vocabulary's head of a model, run after the rest, at a few tokens at a time.

Tangents over a vocabulary are far larger than those of what its head sees. So where a pass cannot
be taken in pieces, it goes through the rest of the network once, and the head follows in parts.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.modes import coarsest_dtype
from laplace_lora.models.changes.thread_hooks import own_hooks
from laplace_lora.models.logits_model import wide
from laplace_lora.models.tangents.forward_mode import ForwardMode
from laplace_lora.models.tolerances import near
from laplace_lora.models.wrapped_model import base_of

logger = logging.getLogger(__name__)


class LateHead:
    """What a head sees in one pass, and the logits that follow from it.

    For these the model reads a single token, and its head is given others in the place of it; so
    whatever the model does to its logits, as Gemma caps them, is done to these as well.

    Args:
        forward: The twin that carries the directions.
        arguments: What it takes of the texts, without a cache.
        alone: What it takes of a single token, likewise.
        columns: Of which tokens logits are wanted.
        length: Of how many tokens the model gives logits.

    Attributes:
        is_right: Whether the logits are the model's own, tried at the last of the tokens.
    """

    def __init__(
        self,
        forward: ForwardMode,
        arguments: dict[str, Any],
        alone: dict[str, Any],
        columns: Tensor,
        length: int,
    ) -> None:
        self._forward, self._alone = forward, alone
        base: Any = base_of(forward.model)
        self._head = base.get_output_embeddings()
        seen: list[Tensor] = []

        def narrow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not args or args[0].ndim != 3 or args[0].shape[1] != length:
                return None
            seen.append(args[0][:, columns])
            return (seen[-1][:, -1:], *args[1:]), kwargs

        def read(returned: Any) -> dict[str, Tensor]:
            found = {"hidden": seen[0]} if seen else {}
            return {**found, "last": wide(returned.logits[:, -1:])}

        with own_hooks() as hooks, as_called():
            hooks.on_input(self._head, narrow)
            self._values, self._tangents = forward.run(arguments, read)
        own = self._values.pop("last"), self._tangents.pop("last")
        dtype = coarsest_dtype(forward.model)
        self.is_right = len(seen) == 1 and all(
            near(a, b, dtype) for a, b in zip(self.logits(slice(-1, None)), own, strict=True)
        )
        if not self.is_right:
            logger.info("the model's logits are no function of what its head sees of a token")

    def logits(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return logits and tangents at some of the columns.

        Returns:
            ``(texts, k, vocabulary)`` and ``(directions, texts, k, vocabulary)``.
        """
        given: dict[str, Tensor] = {}

        def replace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (given["hidden"], *args[1:]), kwargs

        def place(tensors: dict[str, Tensor]) -> dict[str, Any]:
            given.update(tensors)
            return {}

        with own_hooks() as hooks, as_called():
            hooks.on_input(self._head, replace)
            values, tangents = self._forward.run(
                self._alone,
                lambda returned: {"logits": wide(returned.logits)},
                place,
                {"hidden": self._values["hidden"][:, part]},
                {"hidden": self._tangents["hidden"][:, :, part]},
            )
        return values["logits"], tangents["logits"]
