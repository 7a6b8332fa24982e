"""Point out padding that a network masks by itself, of which no attention mask tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Block
from laplace_lora.capture.tape import Tape
from laplace_lora.display.warning import warn

NO_TEXT = ("label", "token_type", "position")
SHORTEST = 2  # one token at each text's end may end it, and language models score nothing there


def point_out_own_masks(tape: Tape, blocks: Sequence[Block]) -> bool:
    """Warn of texts without a mask that begin or end with one token on which no output depends.

    Costs a backward pass through the recorded graph, which is kept, where texts look padded.

    Args:
        tape: The recorded forward pass.
        blocks: The trainable tensors.

    Returns:
        Whether it has warned.
    """
    batch = tape.batch
    if not isinstance(batch, Mapping) or any("attention_mask" in str(key) for key in batch):
        return False
    runs = list(_runs(batch, tape.examples))
    if not runs:
        return False
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *tape.output.shape, generator=generator, dtype=torch.float64)
    unread: dict[torch.Size, Tensor] = {}

    def visit(column: int, i: int, grad: Tensor) -> None:
        if grad.ndim == 3:
            shape, zero = grad.shape[:2], (grad == 0).all(-1).cpu()
            unread[shape] = unread.get(shape, torch.ones_like(zero)) & zero

    parameters = [block.parameter for block in blocks if block.map < len(tape.inputs)]
    tape.backward(noise.to(tape.output), visit, parameters)
    for token, run in runs:
        if run.shape in unread and torch.equal(run, unread[run.shape]):
            warn(
                f"no output depends on the {token}s with which texts begin or end, as on padding, "
                "and the batch has no 'attention_mask': Kronecker factors count them as text. Give "
                "the batch one, of ones at real tokens, or take a DiagLoraLaplace or "
                "FullLoraLaplace, which need no masks"
            )
            return True
    return False


def _runs(batch: Mapping[str, Any], examples: int) -> Iterator[tuple[int, Tensor]]:
    """Yield tokens, and where texts begin or end with them, ``(batch, tokens)``."""
    for key, ids in batch.items():
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            continue
        is_text = not any(part in str(key) for part in NO_TEXT)
        if not is_text or len(ids) != examples or ids.shape[1] < SHORTEST:
            continue
        for from_end in (False, True):
            inwards = ids.cpu().flip(-1) if from_end else ids.cpu()
            repeated = (inwards[:, :SHORTEST] == inwards[:, :1]).all(-1)
            for token in inwards[repeated, 0].unique().tolist():
                run = (inwards == token).cumprod(-1).bool()
                if not bool(run.all()):
                    yield token, run.flip(-1) if from_end else run
