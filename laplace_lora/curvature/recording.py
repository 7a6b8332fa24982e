"""`Recording`: which trainable tensors are covered, and how one batch is recorded and verified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.diagonal_maps import whole_instead
from laplace_lora.adapters.discovery import trainable_maps
from laplace_lora.adapters.in_use import check_in_use
from laplace_lora.adapters.maps import Block, LinearMap
from laplace_lora.adapters.peft_state import check_adapters
from laplace_lora.capture.gradient_flow import gradients_flow
from laplace_lora.capture.gradient_scale import measured_gain
from laplace_lora.capture.image_verification import verify_images
from laplace_lora.capture.mask_verification import verify_masks
from laplace_lora.capture.output_verification import verify_outputs
from laplace_lora.capture.recorder import MisfitError, check_masks, record
from laplace_lora.capture.tape import Tape
from laplace_lora.capture.text_layers import layers_of_texts
from laplace_lora.capture.verification import verify_gradients
from laplace_lora.data.batches import doubled, splits_by_example
from laplace_lora.data.pairs import passes
from laplace_lora.data.sharding import in_pieces
from laplace_lora.linalg.finite import all_finite
from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.compiled import eager
from laplace_lora.models.changes.expert_layers import experts_as_layers
from laplace_lora.models.changes.modes import coarsest_dtype, differentiable
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.models.inputs.unmasked import check_is_masked, padding_token
from laplace_lora.models.last_layer_model import LastLayerModel

_COVERING = threading.Lock()


class Recording:
    """Records a model's passes, and gives layers that do not fit a diagonal block if it may.

    Args:
        model: From a batch to outputs.
        trained: The part of the model whose trainable tensors count.
        uncovered: What becomes of trainable tensors that no Kronecker factor covers, see `Engine`.
        verify: Verify the first batch, see `capture.verification`.
        by_token: Whether outputs have a row per token, see `Likelihood.rows_are_tokens`.

    Attributes:
        is_verified: Whether that has been done; set it to false to have it done again.
        met: Kinds of batches that processes with data of their own have run together, see `steps`.

    Raises:
        ValueError: If ``uncovered`` is unknown, nothing is trainable, or a trainable tensor is in
            no linear map and ``uncovered="error"``.
        RuntimeError: If an adapter is merged or disabled, or several are active.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: nn.Module,
        uncovered: str,
        verify: bool,
        by_token: bool,
    ) -> None:
        self.model = model
        self.uncovered = uncovered
        self.verify = verify
        self.by_token = by_token
        self.is_verified = False
        self.met: set[Any] = set()
        self._together = False  # by a batch of several examples
        self._masks_are_verified = False  # by a batch with padding, which may not be the first
        self._of_texts: set[tuple[str, int]] = set()  # known to see texts, see `verify_images`
        self._texts_are_tried = False  # without images
        self._gain: float | None = None  # of the first batch, see `Tape`
        self._gain_is_known = False
        in_pieces(model.modules())
        self._covered = trainable_maps(trained, uncovered)

    @property
    def maps(self) -> list[LinearMap]:
        """Trainable linear maps, and tensors with a diagonal block."""
        return self._covered[0]

    @property
    def blocks(self) -> list[Block]:
        """Trainable tensors, in parameter order."""
        return self._covered[1]

    def start_anew(self) -> None:
        """Have the next batch verified, as if there had been none."""
        self.is_verified = self._gain_is_known = False
        self.met.clear()

    def cover_whole(self, maps: Sequence[int]) -> None:
        """Give the tensors of some maps diagonal blocks from now on.

        Args:
            maps: Indices of the maps.
        """
        self._covered = whole_instead(self.maps, self.blocks, maps)

    def tape(
        self,
        x: Any,
        function: Callable[[Any], Tensor] | None = None,
        examples: int | None = None,
        needs_masks: bool = False,
    ) -> tuple[Tape, Sequence[Block]]:
        """Return a recorded forward pass, and the tensors that its maps belong to.

        Args:
            x: Batch that the model takes.
            function: What runs instead of the model itself, by the same maps; is not verified.
            examples: Number of examples, if it is not the number of output rows.
            needs_masks: Whether every recorded layer must know which of its tokens are real.

        Raises:
            MisfitError: If a layer's calls fit no Kronecker factors, and ``uncovered="error"``.
            RuntimeError: If a verification finds fault with the first batch.
        """
        with in_turn(self.model):
            return self._tape(x, function, examples, needs_masks)

    def _tape(
        self,
        x: Any,
        function: Callable[[Any], Tensor] | None,
        examples: int | None,
        needs_masks: bool,
    ) -> tuple[Tape, Sequence[Block]]:
        named = list(self.model.named_modules())  # once: large models have thousands
        modules = [module for _, module in named]
        in_pieces(modules)
        check_adapters(named)
        check_in_use(named, [(block.name, block.parameter) for block in self.blocks])
        run = self.model if function is None else function
        x = getattr(self.model, "named", lambda batch: batch)(x)
        config = getattr(self.model, "config", None)
        with (
            differentiable(modules),
            eager(modules),
            experts_as_layers(modules),
            as_called(),
        ):
            while True:
                maps, blocks = self._covered
                verifies = self.verify and function is None and self._is_due(x)
                try:
                    with gradients_flow(named) if verifies else nullcontext():
                        tape = record(run, maps, x, examples=examples, config=config)
                        tape.gain = self._gain
                    if needs_masks:
                        self._check_masks(tape)
                    if verifies or not self._gain_is_known:
                        self._measure_gain(tape, blocks)
                    is_uneven = tape.examples > 1 and not tape.images_are_even
                    if self.verify and is_uneven and all_finite(tape.output):
                        by_token = self.by_token and function is None
                        verify_images(tape, blocks, by_token, self._of_texts)
                        if function is None:
                            self._try_texts(tape, x, config)
                    if verifies:
                        if tape.examples == 1 and splits_by_example(x, 1):
                            self._verify_twice(run, x)
                        self._verify(tape, blocks, x)
                        self._masks_are_verified = False
                    is_due = self.verify and needs_masks and not self._masks_are_verified
                    if is_due and all_finite(tape.output):
                        alone = partial(record, run, maps, examples=1)
                        self._masks_are_verified = verify_masks(tape, blocks, alone)
                    return tape, blocks
                except MisfitError as error:
                    if self.uncovered == "error":
                        raise
                    with _COVERING:  # unless another thread has done so meanwhile
                        if self._covered[0] is maps:
                            self.cover_whole(error.maps)

    def _is_due(self, x: Any) -> bool:
        """Return whether a batch is to be verified: the first, and the first of several examples.

        Layers that mix examples show it in the latter alone.
        """
        return not self.is_verified or not (self._together or splits_by_example(x, 1))

    def _verify_twice(self, run: Any, x: Any) -> None:
        """Verify a single example beside itself; alone it hides which dimension counts examples."""
        maps, blocks = self._covered
        try:
            twice = record(run, maps, doubled(x), examples=2)
        except ValueError:
            if padding_token(getattr(self.model, "config", None)) is not None:
                raise
            return  # transformers' decoders classify one text at a time then
        if twice.has_rows_apart:
            verify_gradients(twice, blocks, self.by_token)

    def _try_texts(self, tape: Tape, x: Any, config: Any) -> None:
        """Find out, once, which layers see texts; later batches need not be looked at for these.

        From the verified pass of a batch whose images are not one of each text. Not with dropout,
        as equal images would seem to differ.
        """
        if not self._texts_are_tried and not self.model.training:
            self._texts_are_tried = True
            alone = partial(record, self.model, tape.maps, examples=2, skip_idle=True)
            self._of_texts |= layers_of_texts(x, config, alone)

    def _check_masks(self, tape: Tape) -> None:
        """Refuse batches that do not say which tokens are real."""
        config = getattr(self.model, "config", None)
        for text in passes(tape.batch):
            check_is_masked(text, config, "Kronecker factors would count it")
        check_masks(tape)

    def _measure_gain(self, tape: Tape, blocks: Sequence[Block]) -> None:
        """Find out by how much float16 gradients of the model must be scaled."""
        if not all_finite(tape.output):
            return
        self._gain = tape.gain = None
        dtypes = {tape.coarsest(b.map, b.parameter) for b in blocks if b.map < len(tape.inputs)}
        if torch.float16 in dtypes | {p.dtype for p in self.model.parameters()}:
            # All the same would be nothing but a shift of logits.
            weights = torch.linspace(0.5, 1, tape.output.shape[-1]).to(tape.output)
            column = weights.expand_as(tape.output).unsqueeze(0)
            tape.gain = measured_gain(lambda sent: tape.gradient_sizes(column * sent))
            self._gain = tape.gain
        self._gain_is_known = True

    def _verify(self, tape: Tape, blocks: Sequence[Block], x: Any) -> None:
        """Verify a recorded pass, see `capture.verification`."""
        if not all_finite(tape.output):
            return  # refused for that by whoever asked
        verify_gradients(tape, blocks, self.by_token)
        split = getattr(self.model, "model", None)  # laplace-torch wraps last layers
        source = split.source if isinstance(split, LastLayerModel) else None
        # With dropout no two passes agree; a last layer's features are computed without.
        if source is not None or not self.model.training:
            dtype = coarsest_dtype(self.model if source is None else source)
            shape = (tape.examples, dtype, self.by_token)
            verify_outputs(self.model, x, tape.output, *shape)
        self._together = tape.examples > 1 or not splits_by_example(x, 1)
        self.is_verified = True
