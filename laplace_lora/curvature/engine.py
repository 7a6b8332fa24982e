"""`Differentiation`: a model's outputs and loss, differentiated by its adapters' weights.

The part of a backend that runs the model: which tensors are differentiated, in which number format,
how one batch is recorded, and laplace-torch's questions for Jacobians and gradients. How a recorded
pass is differentiated belongs to `jacobians`, what becomes of the rows to `curvature` and
`predictive`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from laplace.curvature import CurvatureInterface
from torch import Tensor, nn

from laplace_lora.adapters.diagonal_maps import whole_instead
from laplace_lora.adapters.discovery import trainable_maps
from laplace_lora.adapters.maps import wide_dtype
from laplace_lora.adapters.peft_state import check_adapters
from laplace_lora.capture.jacobians import jacobian_blocks
from laplace_lora.capture.recorder import MisfitError, record
from laplace_lora.capture.tape import Tape
from laplace_lora.likelihoods import roots as likelihoods
from laplace_lora.models.modes import differentiable


class Differentiation(CurvatureInterface):
    """Jacobians and gradients of a model, from one backward pass a column for a whole batch.

    The model is taken in the mode it is in: put it in evaluation mode first, as ``fit`` does.

    Args:
        model: Model from a batch to outputs.
        likelihood: ``"classification"``, ``"regression"`` or, with a `TokenModel`,
            ``"language_modeling"``.
        *args: The rest of laplace-torch's arguments.
        uncovered: What becomes of trainable tensors that no Kronecker factor covers: ``"error"``
            names them, ``"diag"`` gives each a block with the exact diagonal. Norms and DoRA's
            magnitudes cost next to nothing; anything else costs one more forward pass and its
            backward passes for each example alone.
        **kwargs: laplace-torch's arguments.

    Raises:
        ValueError: If an argument is out of range, nothing is trainable, or a trainable tensor
            belongs to no linear map and ``uncovered="error"``.
        RuntimeError: If an adapter is merged or disabled, or several are active.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *args: Any,
        uncovered: str = "error",
        **kwargs: Any,
    ) -> None:
        language = likelihood == likelihoods.LANGUAGE_MODELING
        known = likelihoods.CLASSIFICATION if language else likelihood  # to laplace-torch
        super().__init__(model, known, *args, **kwargs)
        self.likelihood = likelihood
        self.n_outputs = 0
        self.uncovered = uncovered
        self.maps, self.blocks = trainable_maps(self._model, uncovered)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of factors and Jacobians: the adapters', float32 at least."""
        return wide_dtype([block.parameter for block in self.blocks])

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Return Jacobians from one backward pass an output.

        Args:
            x: Batch that the model takes.
            enable_backprop: Whether gradients flow through the result; then laplace-torch's own
                `torch.func.jacrev` is used, at its price.

        Returns:
            Jacobians ``(batch, outputs, parameters)`` and outputs ``(batch, outputs)``.
        """
        if enable_backprop:
            self._check_outputs_few()
            return super().jacobians(x, enable_backprop=True)
        f, blocks = self.jacobian_blocks(x)
        return self._joined(blocks), f

    def selected_output_jacobians(
        self, x: Any, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return Jacobians of chosen outputs of each example, one backward pass a choice.

        Args:
            x: Batch that the model takes.
            outputs: Output indices, ``(batch,)`` or ``(batch, choices)``.
            enable_backprop: As in `jacobians`.

        Returns:
            Jacobians ``(batch, choices, parameters)`` and outputs ``(batch, outputs)``.
        """
        self._check_outputs_few()
        if enable_backprop:
            return super().selected_output_jacobians(x, outputs, enable_backprop=True)

        def columns(f: Tensor) -> Tensor:
            chosen = outputs.reshape(len(outputs), -1).to(f.device)
            return torch.nn.functional.one_hot(chosen, f.shape[-1]).transpose(0, 1).to(f.dtype)

        f, blocks = self.jacobian_blocks(x, columns)
        return self._joined(blocks), f

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return each example's gradient of laplace-torch's ``lossfunc``.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.

        Returns:
            Gradients ``(batch, parameters)`` and the summed loss. For regression the loss is the
            squared error without its half, as laplace-torch defines it.
        """
        tape, loss = self._forward(x, y)
        columns = likelihoods.empirical_root(tape.output, y, self.likelihood) / self.factor
        rows = self._joined(jacobian_blocks(tape, self.blocks, columns, self.dtype))
        return rows[:, 0], loss / self.factor

    def jacobian_blocks(
        self,
        x: Any,
        columns: Callable[[Tensor], Tensor] | None = None,
        function: Callable[[Any], Tensor] | None = None,
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Return outputs, and Jacobians tensor by tensor.

        Args:
            x: Batch that the model takes.
            columns: From the outputs ``(batch, outputs)`` to the gradients sent backward,
                ``(columns, batch, outputs)``; one column an output when ``None``.
            function: What to differentiate instead of the model's own outputs: from a batch to
                ``(batch, outputs)``, by the same maps.

        Returns:
            Outputs ``(batch, outputs)``, and an iterator over ``(batch, columns, *shape)`` of each
            trainable tensor in parameter order.

        Raises:
            ValueError: If the outputs are those of a language model.
        """
        if function is None:
            self._check_outputs_few()
        tape = self._record(x, function)
        f = tape.output
        roots = likelihoods.identity_root(f) if columns is None else columns(f)
        return f, jacobian_blocks(tape, self.blocks, roots, self.dtype)

    def cover_whole(self, maps: Sequence[int]) -> None:
        """Give the tensors of some maps diagonal blocks from now on.

        Args:
            maps: Indices of the maps.
        """
        self.maps, self.blocks = whole_instead(self.maps, self.blocks, maps)

    def _forward(self, x: Any, y: Tensor) -> tuple[Tape, Tensor]:
        tape = self._record(x, examples=len(y))
        loss = likelihoods.negative_log_likelihood(tape.output, y, self.likelihood)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.n_outputs = tape.output.shape[-1]
        return tape, loss

    def _record(
        self,
        x: Any,
        function: Callable[[Any], Tensor] | None = None,
        examples: int | None = None,
    ) -> Tape:
        check_adapters(self.model)
        run = self.model if function is None else function
        with differentiable(self.model):
            try:
                return record(run, self.maps, x, examples=examples)
            except MisfitError as error:
                if self.uncovered == "error":
                    raise
                self.cover_whole(error.maps)
            return record(run, self.maps, x, examples=examples)

    def _check_outputs_few(self) -> None:
        if self.likelihood == likelihoods.LANGUAGE_MODELING:
            raise ValueError(
                "a language model's outputs, its whole vocabulary at every token, are too many for "
                "Jacobians; `laplace_lora.generation` predicts the likeliest tokens, and "
                "method='marglik' tunes the prior without predictions"
            )

    def _joined(self, blocks: Iterator[Tensor]) -> Tensor:
        return self._subnetwork(torch.cat([block.flatten(2) for block in blocks], dim=-1))

    def _subnetwork(self, values: Tensor) -> Tensor:
        indices = self.subnetwork_indices
        return values if indices is None else values[..., indices.to(values.device)]
