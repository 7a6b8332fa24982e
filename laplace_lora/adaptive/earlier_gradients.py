"""Gradients that parameters carry when weights are drawn: whether the draw's are added to them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import TensorWeakRef


class EarlierGradients:
    """Watches the gradients that parameters have, until the first addition to each.

    Args:
        parameters: The parameters. Those without a gradient need no watching.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        self._watches = [_Watch(p, p.grad) for p in parameters if p.grad is not None]

    def remain(self) -> bool:
        """Watch no longer, and return whether one was neither zeroed nor replaced in time."""
        watches, self._watches = self._watches, []
        return any([watch.remains() for watch in watches])


class _Watch:
    def __init__(self, p: nn.Parameter, gradient: Tensor) -> None:
        self._p = p
        # Zeroing and adding in place both leave the object and raise its version, so that the
        # version tells only before the first addition. The reference keeps no memory occupied.
        self._gradient, self._version = TensorWeakRef(gradient), gradient._version
        self._remains: Tensor | bool | None = None
        # A hook of the parameter itself would also run for `autograd.grad`, which adds nothing. A
        # node that nothing refers to is made anew, without its hooks.
        self._node = get_gradient_edge(p).node
        self._hook = self._node.register_prehook(self._look)

    def _look(self, added: tuple[Tensor, ...] = ()) -> None:
        now = self._p.grad
        if now is None:
            self._remains = False  # whatever was added before, too
        elif self._remains is None:
            same = now is self._gradient() and now._version == self._version
            self._remains = now.any() if same else False

    def remains(self) -> bool:
        self._hook.remove()
        self._look()
        return bool(self._remains)
