"""`Engine`: a model's outputs and loss, differentiated by its adapters' weights, batch by batch.

How one batch is recorded is in `recording`, what is summed over batches in `batch_curvature` and
`kfac`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.maps import Block, LinearMap, wide_dtype
from laplace_lora.capture.differentiable import differentiable_jacobians
from laplace_lora.capture.jacobians import jacobian_blocks
from laplace_lora.capture.tape import Tape
from laplace_lora.curvature.kfac_rows import KfacRows
from laplace_lora.curvature.loss_gradient import LossGradient, ResidualColumns
from laplace_lora.curvature.recording import Recording
from laplace_lora.likelihoods.base import Columns, Likelihood
from laplace_lora.likelihoods.label_check import check_loss
from laplace_lora.likelihoods.links import check_finite
from laplace_lora.likelihoods.roots import identity_root
from laplace_lora.models.changes.modes import device_of

Root = Callable[[Tensor, Tensor], Tensor]


class Engine:
    """Jacobians and curvature roots of a model, from one backward pass per column for a batch.

    The model is taken in the mode it is in: put it in evaluation mode first, as a fit does.

    Args:
        model: From a batch to outputs.
        objective: Likelihood of the outputs.
        root: From outputs and labels to the columns ``(columns, batch, outputs)`` whose outer
            products are the output Hessian.
        rows: Which rows of inputs and gradients enter Kronecker factors.
        uncovered: What becomes of trainable tensors that no Kronecker factor covers: ``"error"``
            names them, ``"diag"`` gives each a block with the exact diagonal. Norms and DoRA's
            magnitudes cost next to nothing; anything else costs one more forward pass and its
            backward passes for each example alone.
        trained: The part of the model whose trainable tensors count; the model when ``None``.
        verify: Verify the first batch against autograd and the model's own forward pass, see
            `capture.verification`, and batches in which images are not one of each text.
        draws_labels: Whether the root is sampled, so that it does not bring the loss's gradient.
        estimates: Whether the root is not the likelihood's own: labels are drawn, or observed.

    Attributes:
        recording: Which tensors are covered, and whether the first batch has been verified.
        n_outputs: Outputs of the latest labelled batch, 0 before there was one.

    Raises:
        ValueError: If an argument is out of range, nothing is trainable, or a trainable tensor is
            in no linear map and ``uncovered="error"``.
        RuntimeError: If an adapter is merged or disabled, or several are active.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Likelihood,
        root: Root,
        rows: KfacRows | None = None,
        uncovered: str = "error",
        trained: nn.Module | None = None,
        verify: bool = True,
        draws_labels: bool = False,
        estimates: bool = False,
    ) -> None:
        self.model = model
        self.objective = objective
        self.root = root
        self.rows = KfacRows() if rows is None else rows
        self.n_outputs = 0
        self.draws_labels = draws_labels
        self.estimates = estimates
        trained = model if trained is None else trained
        self.recording = Recording(model, trained, uncovered, verify, objective.rows_are_tokens)

    @property
    def maps(self) -> list[LinearMap]:
        """Trainable linear maps, and tensors with a diagonal block."""
        return self.recording.maps

    @property
    def blocks(self) -> list[Block]:
        """Trainable tensors, in parameter order."""
        return self.recording.blocks

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors, in parameter order."""
        return [block.parameter for block in self.blocks]

    @property
    def sizes(self) -> list[int]:
        """Numbers in each trainable tensor."""
        return [parameter.numel() for parameter in self.parameters]

    @property
    def names(self) -> list[str]:
        """Names of the trainable tensors."""
        return [block.name for block in self.blocks]

    @property
    def sides(self) -> list[list[int]]:
        """Lengths of the sides of each trainable tensor's Kronecker block."""
        return [block.sides for block in self.blocks]

    @property
    def device(self) -> torch.device:
        """Where inputs go and outputs come from, see `device_of`."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of factors and Jacobians: the adapters', float32 at least."""
        return wide_dtype(self.parameters)

    @property
    def passes_are_known(self) -> bool:
        """Whether batches of one kind take equally many passes, see `kind_of`.

        Whole tensors take some for each example, and exact roots of tokens some for each token.
        """
        has_tokens = self.objective.rows_are_tokens or self.objective.has_spans
        return self.recording.uncovered == "error" and (self.estimates or not has_tokens)

    def jacobian_blocks(
        self,
        x: Any,
        columns: Columns | None = None,
        function: Callable[[Any], Tensor] | None = None,
        examples: int | None = None,
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Return outputs, and Jacobians tensor by tensor.

        Args:
            x: Batch that the model takes.
            columns: From the outputs ``(batch, outputs)`` to the gradients sent backward,
                ``(columns, batch, outputs)``; one column per output when ``None``.
            function: What to differentiate instead of the model's own outputs: from a batch to
                ``(batch, outputs)``, by the same maps.
            examples: Number of examples, where rows of the outputs are not examples.

        Returns:
            Outputs ``(batch, outputs)``, and an iterator over ``(batch, columns, *shape)`` of each
            trainable tensor in parameter order.

        Raises:
            ValueError: If the outputs are those of a language model.
            FloatingPointError: If they are not finite; names the rows.
        """
        if function is None:
            self.check_outputs_few()
        tape, blocks = self.recording.tape(x, function, examples)
        f = tape.output
        if function is None:
            check_finite(f)
        roots = identity_root(f) if columns is None else columns(f)
        return f, jacobian_blocks(tape, blocks, roots, self.dtype)

    def differentiable_jacobians(self, x: Any) -> tuple[Tensor, Tensor]:
        """Return outputs and Jacobians that can be differentiated, see `capture.differentiable`.

        Raises:
            ValueError: If the outputs are those of a language model.
            FloatingPointError: If they are not finite; names the rows.
        """
        self.check_outputs_few()
        return differentiable_jacobians(self.model, x)

    def root_blocks(
        self, x: Any, y: Tensor, gradient: LossGradient | None = None, exact: bool = False
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Return the summed loss, and rows ``Z`` whose ``Zᵀ Z`` is the curvature, by tensor.

        Args:
            x: Batch that the model takes.
            y: Labels, see `Likelihood.split`.
            gradient: Where the loss's gradient is added up, as the blocks are consumed.
            exact: Whether to take the likelihood's own root in any case.

        Returns:
            The loss, and an iterator over ``(batch, columns, *shape)`` of each trainable tensor in
            parameter order.

        Raises:
            ValueError: If labels lie outside the classes.
            FloatingPointError: If the loss is not finite.
        """
        tape, loss = self.forward(x, y)
        root = (self.objective.root if exact else self.root)(tape.output, y)
        if gradient is None:
            return loss, jacobian_blocks(tape, self.blocks, root, self.dtype)
        columns = self.residual_columns(tape, root, y)
        blocks = jacobian_blocks(tape, self.blocks, columns.columns, self.dtype)
        return loss, gradient.tapped(blocks, columns)

    def loss_gradient(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch's summed loss, and its gradient, ``(parameters,)``.

        Raises:
            ValueError: If labels lie outside the classes.
            FloatingPointError: If the loss is not finite.
        """
        tape, loss = self.forward(x, y)
        columns = self.objective.residual(tape.output, y)
        blocks = jacobian_blocks(tape, self.blocks, columns, self.dtype)
        parts = [block.sum((0, 1)).flatten().to(self.device) for block in blocks]
        return loss, torch.cat(parts)

    def residual_columns(self, tape: Tape, root: Tensor, y: Tensor) -> ResidualColumns:
        """Return a root's columns, with what makes them bring the loss's gradient as well.

        Args:
            tape: The recorded forward pass.
            root: Columns of the output Hessian's root for its outputs.
            y: Labels.
        """
        f, objective = tape.output, self.objective
        weights = objective.residual_weights(root, f, y)
        return ResidualColumns(root, objective.residual(f, y), weights, tape.examples)

    def forward(self, x: Any, y: Tensor, needs_masks: bool = False) -> tuple[Tape, Tensor]:
        """Record a labelled batch, and return its summed loss.

        Args:
            x: Batch that the model takes.
            y: Its labels.
            needs_masks: Whether every recorded layer must know which of its tokens are real.

        Raises:
            ValueError: If labels lie outside the classes, or outputs are probabilities already.
            FloatingPointError: If the loss is not finite.
        """
        is_first = self.recording.verify and not self.recording.is_verified
        tape, _ = self.recording.tape(x, examples=len(y), needs_masks=needs_masks)
        if is_first:
            self.objective.check_values(tape.output)
        loss = self.objective.nll(tape.output, y)
        check_loss(loss, y)
        self.n_outputs = tape.output.shape[-1]
        return tape, loss

    def check_outputs_few(self) -> None:
        """Refuse Jacobians of all outputs of a language model.

        Raises:
            ValueError: If the likelihood has too many outputs.
        """
        if self.objective.jacobian_refusal is not None:
            raise ValueError(self.objective.jacobian_refusal)
