"""`before_adapter`: a model as it was before its adapter had learnt anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from laplace_lora.adapters.start import values_at_start
from laplace_lora.data.sharding import in_pieces, write_values
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.changes.twins import in_place, twin_of
from laplace_lora.models.head import last_linear


@contextmanager
def before_adapter(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, Callable[[], AbstractContextManager[None]]]]:
    """Yield a model whose adapter changes nothing, and when it is so.

    The base model answers, with a trained last layer where there is one, whether the adapter's
    tensors are trainable or frozen. Other modules that were trained as a whole have learnt the
    labels, too, and are those that they replaced. That is a twin's state, see `twin_of`, and
    the model itself is not changed. One that cannot have a twin is yielded itself, and is at the
    start only inside the context that the second value makes.

    Raises:
        ValueError: If the adapter's start is not known, see `at_base`.
    """
    in_pieces(model.modules())
    starts = values_at_start(model, _head(model))
    changed = [parameter for parameter, _ in starts]
    own = dict.fromkeys([*(p for p in model.parameters() if p.requires_grad), *changed])
    with evaluation_mode(model):
        twin, copies = twin_of(model, list(own))
        if twin is None:
            yield model, lambda: _set(model, starts)
            return
        copy_of = dict(zip(own, copies, strict=True))
        _write([(copy_of[parameter], value) for parameter, value in starts])
        yield twin, nullcontext


def _head(model: nn.Module) -> nn.Module | None:
    try:
        return last_linear(model, None)
    except ValueError:
        return None


@contextmanager
def _set(model: nn.Module, values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    with in_place(model, [parameter for parameter, _ in values]):
        _write(values)
        yield


def _write(values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in values:
        write_values(parameter, value)
