"""Verify that a batch's attention mask speaks of the tokens that a layer sees.

Mask and layer are matched by their shapes, but a model's latents, or the patches of an image, may
be as many as the tokens of a padded text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Block
from laplace_lora.adapters.selection import listed
from laplace_lora.capture.output_verification import chosen_examples
from laplace_lora.capture.padding_verification import without_padding
from laplace_lora.capture.recorder import MisfitError
from laplace_lora.capture.tape import Tape
from laplace_lora.capture.unmasked_verification import point_out_own_masks
from laplace_lora.data.batches import Batch, one_example
from laplace_lora.models.changes.attention_types import TooShortError
from laplace_lora.models.inputs.unmasked import MASK

NEGLIGIBLE = 1e-6  # of a layer's largest gradient; padding that nobody reads has none
FAR = 0.05  # of a token's length, from its likeness in another batch; half precision rounds
FEWEST_STEPS = 3  # of a layer that runs token by token; twice run heads of pairs of texts
NEARER = 0.1  # how much nearer another token must be to be the likeness


def verify_masks(
    tape: Tape, blocks: Sequence[Block], record_alone: Callable[[Batch], Tape]
) -> bool:
    """Compare how many tokens layers see with and without the padding of one example.

    Only layers whose outputs matter at what a mask calls padding are suspected, and those that run
    several times on a row for each text. Costs a backward pass through the recorded graph, which is
    kept, and if there are any, a forward pass of the example with the most padding.

    Args:
        tape: The recorded forward pass.
        blocks: The trainable tensors.
        record_alone: Records the same maps for another batch.

    Returns:
        Whether the batch has told what there is to know, or padding without a mask was pointed
        out; otherwise another batch may tell.

    Warns:
        UserWarning: If texts without a mask look padded, see `point_out_own_masks`.

    Raises:
        MisfitError: If a layer sees as many tokens when the padding is gone, sees tokens where the
            mask has padding, as in a text that it reads backwards, or runs once for each token;
            names its tensors.
    """
    masks = {i: mask for i in range(len(tape.inputs)) if (mask := tape.mask(i)) is not None}
    steps = [i for i in range(len(tape.inputs)) if _may_step(tape.calls(i))]
    if not tape.divides:
        return bool(masks) and tape.images_are_even
    if not masks and not steps:
        return point_out_own_masks(tape, blocks)
    n = chosen_examples(tape.batch, tape.examples)[-1]
    single = one_example(tape.batch, n)
    bare = without_padding(single)
    if bare is single:
        return bool(masks) or point_out_own_masks(tape, blocks)
    assert isinstance(single, Mapping) and isinstance(tape.batch, Mapping)
    if bool(single[MASK].all()):
        steps = []
    suspects = _read_at_padding(tape, blocks, masks) if masks else []
    if not (suspects or steps):
        return bool(masks)
    try:
        alone = record_alone(bare)
    except TooShortError:
        return False  # another batch may tell
    _check_steps(tape, alone, steps, blocks)
    for wrong, reason in (
        (
            [i for i in suspects if alone.inputs[i].shape[1] == tape.inputs[i].shape[1]],
            "their number is the same without padding",
        ),
        (
            [i for i in suspects if _are_at_padding(alone.inputs[i][0], tape, i, n, masks[i])],
            "a text's tokens stand where the mask has padding",
        ),
    ):
        if wrong:
            names = listed([block.name for block in blocks if block.map in wrong])
            raise MisfitError(
                f"{names}: the layer sees as many tokens as the batch's attention mask has, but "
                f"not the same ones, as {reason}. Which of them are real is unknown; freeze these "
                "tensors first, or give them a diagonal block with uncovered='diag'; verify=False "
                "switches this check off",
                wrong,
            )
    # A layer that runs up to the end of the longest text runs as often on texts of equal lengths.
    lengths = (tape.batch[MASK] != 0).sum(-1)
    return not steps or bool(lengths.min() < lengths.max())


def _check_steps(tape: Tape, alone: Tape, steps: Sequence[int], blocks: Sequence[Block]) -> None:
    """Refuse maps, of some, that run as often as there are tokens.

    Raises:
        MisfitError: If there is one.
    """
    called = dict(map(alone.called, range(len(alone.inputs))))
    wrong = [i for i in steps if called.get(tape.called(i)[0]) != tape.called(i)[1]]
    if wrong:
        names = listed([block.name for block in blocks if block.map in wrong])
        raise MisfitError(
            f"{names}: the layer ran {len(tape.calls(wrong[0]))} times in a batch, and another "
            "number of times without padding, as a layer does that runs once for each token. Which "
            "of its calls are at padding is unknown; freeze these tensors first, or give them a "
            "diagonal block with uncovered='diag' (an exact posterior stays exact)",
            wrong,
        )


def _may_step(calls: Sequence[Tensor]) -> bool:
    """Return whether a map may run token by token: it has run several times, on a row a text."""
    return len(calls) >= FEWEST_STEPS and calls[0].ndim == 2


def _are_at_padding(tokens: Tensor, tape: Tape, i: int, n: int, mask: Tensor) -> bool:
    """Return whether what map ``i`` sees of text ``n`` alone stands at padding within the batch."""
    rows, is_real = tape.inputs[i][n], mask[n]
    if tokens.ndim != 2 or rows.ndim != 2 or bool(is_real.all()):
        return False
    apart = torch.cdist(tokens.float(), rows.float())
    from_real, from_padding = (apart[:, part].amin(1) for part in (is_real, ~is_real))
    is_far = from_real > FAR * rows.float().norm(dim=1).mean()
    return bool((is_far & (from_padding < NEARER * from_real)).any())


def _read_at_padding(tape: Tape, blocks: Sequence[Block], masks: dict[int, Tensor]) -> list[int]:
    """Return the maps at whose padding a random combination of the outputs has a gradient."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *tape.output.shape, generator=generator, dtype=torch.float64)
    found = []

    def visit(column: int, i: int, grad: Tensor) -> None:
        mask = masks.get(i)
        if mask is not None and grad.shape[:-1] == mask.shape:
            sizes = grad.abs().amax(-1)
            at_padding = sizes.masked_fill(mask, 0).max()
            if bool(at_padding > NEGLIGIBLE * sizes.max()):
                found.append(i)

    parameters = [block.parameter for block in blocks if block.map in masks]
    tape.backward(noise.to(tape.output), visit, parameters)
    return sorted(found)
