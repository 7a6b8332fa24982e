"""Verify that layers see a row of each text where images are not one of each.

A tower's input then has a row per image. It may have as many as there are texts, and would be taken
for one of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Block
from laplace_lora.adapters.selection import listed
from laplace_lora.capture.gradient_scale import largest
from laplace_lora.capture.recorder import MisfitError
from laplace_lora.capture.tape import Tape
from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels

NEGLIGIBLE = 1e-6  # of a text's largest gradient; where texts do not mix there is none


def verify_images(
    tape: Tape, blocks: Sequence[Block], by_token: bool, of_texts: set[tuple[str, int]]
) -> None:
    """Verify that the outputs of each text have a gradient at its own row of every layer alone.

    Texts without an image come first: a layer where such a text has a gradient sees texts, in every
    batch. If all layers do, the others need not be looked at. Costs a backward pass per text looked
    at, through the recorded graph, which is kept.

    Args:
        tape: The recorded forward pass of a batch in which some texts have no image.
        blocks: The trainable tensors.
        by_token: Whether an example has a row of the output for each of its tokens that counts.
        of_texts: Names of the layers that are known to see texts, and how often each is called, as
            of `layers_of_texts`; those found out are added.

    Raises:
        MisfitError: If a row of a layer is of another text's image; names the layer's tensors.
    """
    counts = torch.ones(tape.examples, dtype=torch.long)
    if by_token:
        batch: Any = tape.batch
        counts = (token_labels(batch, batch["labels"]) != IGNORED).sum(1).cpu()
    ends = counts.cumsum(0).tolist()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tape.output.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(tape.output)
    numbers = tape.with_images.sum(0).cpu()  # of kinds of images that a text has
    if len(numbers) != tape.examples:  # of several texts each
        numbers = torch.ones_like(counts)
    for n in numbers.argsort(stable=True).tolist():
        looked_at = [
            block
            for block in blocks
            if block.map < len(tape.inputs) and tape.called(block.map) not in of_texts
        ]
        if not looked_at:
            return
        columns = torch.zeros_like(noise).unsqueeze(0)
        rows = slice(ends[n] - int(counts[n]), ends[n])
        columns[0, rows] = noise[rows]
        own, mixed = _reached(tape, columns, n, [block.parameter for block in looked_at])
        if mixed:
            names = listed([block.name for block in blocks if block.map in mixed])
            raise MisfitError(
                f"{names}: the layer sees as many images as the batch has texts, but not one of "
                "each, so it is unknown which text a row belongs to. Give batches in which every "
                "text has one image, or one text at a time (batch_size=1, with uncovered='diag'), "
                "or freeze these tensors; verify=False switches this check off",
                sorted(mixed),
            )
        if not numbers[n]:
            of_texts.update(tape.called(i) for i in own)  # one more call may be an image's


def _reached(
    tape: Tape, columns: Tensor, n: int, parameters: Sequence[Tensor]
) -> tuple[set[int], set[int]]:
    """Return the maps with a gradient at example ``n``'s row, and those with one elsewhere."""
    own, mixed = set(), set()

    def visit(column: int, i: int, grad: Tensor) -> None:
        size = largest(grad[n])
        if size:
            own.add(i)
        if max(largest(grad[:n]), largest(grad[n + 1 :])) > NEGLIGIBLE * size:
            mixed.add(i)

    tape.backward(columns, visit, parameters)
    return own, mixed
