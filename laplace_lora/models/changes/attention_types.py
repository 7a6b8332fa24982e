"""Keep block-sparse attention: BigBird turns to the full one for good at a short batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from laplace_lora.models.changes.holders import Holders

SWITCH, KIND, SPARSE = "set_attention_type", "attention_type", "block_sparse"


class TooShortError(ValueError):
    """A batch has too few tokens for block-sparse attention."""


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise TooShortError(
        "the batch has too few tokens for the model's block-sparse attention, so it would turn to "
        "full attention for good, and numbers would depend on the order of batches. Give it full "
        "attention for all texts, by from_pretrained(..., attention_type='original_full') or its "
        "set_attention_type('original_full'), or pad every batch to more tokens, some 700 by "
        "default ((5 + 2 * num_random_blocks) * block_size)"
    )


# On the object, before the class's own, which a forward pass calls.
_KEPT: Holders[Any] = Holders(
    lambda module: setattr(module, SWITCH, _refuse), lambda module: vars(module).pop(SWITCH, None)
)


@contextmanager
def attention_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let no forward pass change the kind of a model's attention, temporarily.

    Args:
        modules: The model's.
    """
    sparse = [m for m in modules if hasattr(type(m), SWITCH)]
    with _KEPT.hold(sparse, lambda m: getattr(m, KIND, None) == SPARSE and SWITCH not in vars(m)):
        yield
