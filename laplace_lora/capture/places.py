"""`Places`: at whose tokens the layers of an encoder-decoder stand, call by call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from laplace_lora.capture.arguments import Signature
from laplace_lora.data.masks import Place
from laplace_lora.models.changes.thread_hooks import OwnHooks

# What transformers' decoders, their layers and their attentions call an encoder's output.
STATES = ("encoder_hidden_states", "key_value_states")
GETTERS = ("get_encoder", "get_decoder")


class Places:
    """At whose tokens the layers of a model stand, while it runs.

    Layers under the encoder stand at its tokens, and so do those whose input is its output, such as
    keys and values of cross-attention. All other layers of the decoder, and those that run after
    it, stand at the decoder's. Shapes say nothing: both may be padded to the same length.

    Args:
        model: The model, or anything else, of whose places nothing is known.
        layers: The layers that will be asked about.
        hooks: Gets those that follow the model's calls.
    """

    def __init__(self, model: object, layers: Iterable[nn.Module], hooks: OwnHooks) -> None:
        self._states: list[Tensor] = []
        self._running: Place | None = None  # by whichever of the two began last
        self._inside = 0  # modules now running whose input is the encoder's output
        found = stacks(model)
        if found is None:
            return
        whole, encoder, decoder = found
        hooks.on_input(whole, self._begin)
        hooks.on_output(whole, self._end)
        hooks.on_input(encoder, self._begin_encoder)
        hooks.on_output(encoder, self._end_encoder)
        for module in {decoder, *_ancestors(whole, layers)} - {whole, *encoder.modules()}:
            self._follow(module, hooks, is_decoder=module is decoder)

    def of(self, x: object) -> Place | None:
        """Return where a layer of this input stands that is running now; ``None`` if unknown."""
        if self._running == "encoder" or self._inside or self._is_encoded(x):
            return "encoder"
        return self._running

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states, self._running, self._inside = [], None, 0

    def _end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._states = []  # they would keep the graph in memory

    def _begin_encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = "encoder"

    def _end_encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._running = None
        self._note(output if isinstance(output, Tensor) else output[0])

    def _follow(self, module: nn.Module, hooks: OwnHooks, is_decoder: bool) -> None:
        signature = Signature(module)
        encoded: list[bool] = []  # of the calls now running

        def begins(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_decoder:
                self._running = "decoder"
            named = signature.named(args, kwargs)
            for name in STATES:
                self._note(named.get(name))
            first = args[0] if args else next((named[n] for n in signature.names if n in named), 0)
            encoded.append(self._is_encoded(first))
            self._inside += encoded[-1]

        def ends(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._inside -= encoded.pop()

        hooks.on_input(module, begins)
        hooks.on_output(module, ends)

    def _note(self, states: object) -> None:
        if isinstance(states, Tensor) and not self._is_encoded(states):
            self._states.append(states)

    def _is_encoded(self, x: object) -> bool:
        return any(x is states for states in self._states)


def stacks(model: object) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """Return an encoder-decoder, its encoder and its decoder.

    Args:
        model: A module in which it is looked for, or anything else.

    Returns:
        The innermost module that knows the two; ``None`` if there is none, or several of different
        encoders or decoders.
    """
    found: list[tuple[nn.Module, nn.Module, nn.Module]] = []
    for module in model.modules() if isinstance(model, nn.Module) else ():
        # Asked of the class first, as for most modules it takes longest to say what they lack.
        if not all(hasattr(type(module), name) for name in GETTERS):
            continue
        config: Any = getattr(module, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            continue
        encoder, decoder = (getattr(module, name)() for name in GETTERS)
        if not isinstance(encoder, nn.Module) or not isinstance(decoder, nn.Module):
            continue
        # A model without the one or the other returns itself.
        if encoder not in set(decoder.modules()) and decoder not in set(encoder.modules()):
            found.append((module, encoder, decoder))
    return found[-1] if len({pair[1:] for pair in found}) == 1 else None


def _ancestors(model: nn.Module, layers: Iterable[nn.Module]) -> set[nn.Module]:
    """Return the modules of a model that have some of the layers inside them."""
    parents: dict[nn.Module, set[nn.Module]] = {}
    for module in model.modules():
        for child in module.children():
            parents.setdefault(child, set()).add(module)
    found: set[nn.Module] = set()
    new = set(layers)
    while new := {parent for module in new for parent in parents.get(module, ())} - found:
        found |= new
    return found
