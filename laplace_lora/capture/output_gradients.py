"""`OutputGradient`: where the gradient of a layer's output passes in a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Receiver = Callable[[Tensor], None]


class OutputGradient:
    """The gradient with respect to a layer's output as the layer returned it.

    It must be made while the layer returns: what changes the output in place afterwards, as
    ``nn.ReLU(inplace=True)`` does, takes over the tensor's place in the graph.

    Args:
        output: A layer's output that carries a gradient.

    Attributes:
        edge: Its place in the graph, to differentiate by.
    """

    def __init__(self, output: Tensor) -> None:
        shape = output.shape
        receivers: list[Receiver] = []
        base = output._base
        # An in-place change of a view moves the view in the graph, but not the tensor beneath it.
        # torch's linear layers return views of a matrix.
        if (
            base is not None
            and base.numel() == output.numel()
            and base.is_contiguous()
            and output.is_contiguous()
        ):
            output = base
        self.edge: GradientEdge = get_gradient_edge(output)
        self._receivers = receivers

        # Of the list alone: a hook that held `self`, and with it the edge, would be a cycle through
        # the graph, and keep it in memory.
        def receive(grad: Tensor) -> None:
            for receiver in tuple(receivers):
                receiver(grad.reshape(shape))

        output.register_hook(receive)

    @classmethod
    def of(cls, output: object) -> OutputGradient | None:
        """Return the gradient of a layer's output, ``None`` if it carries none."""
        return cls(output) if isinstance(output, Tensor) and output.requires_grad else None

    @staticmethod
    @contextmanager
    def watched(receivers: Iterable[tuple[OutputGradient, Receiver]]) -> Iterator[None]:
        """Call functions with their gradients whenever a backward pass has computed these."""
        # One context for all: a model may have a thousand, and a batch is done in a second.
        pairs = list(receivers)
        for gradient, receive in pairs:
            gradient._receivers.append(receive)
        try:
            yield
        finally:
            for gradient, receive in pairs:
                gradient._receivers.remove(receive)
