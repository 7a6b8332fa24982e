"""Keep the sums of an unfinished pass in a file, so that an interrupted fit can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from laplace_lora.data import distributed as sharding
from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.storage.files import write_whole
from laplace_lora.storage.fingerprint import exact_fingerprint, identity

DEFAULT_EVERY = 100  # batches


class Snapshot:
    """The sums so far in a file, so that an interrupted pass can go on.

    Args:
        folder: Where the file is kept, one a process.
        every: Batches from one writing to the next.
        la: The posterior that is being fitted; the file belongs to its weights and arguments.
        one: The pass whose sums are kept; the file belongs to its basis.

    Raises:
        ValueError: If ``every`` is not positive.
    """

    def __init__(
        self, folder: str | os.PathLike[str], every: int | None, la: Any, one: Pass
    ) -> None:
        self.every = DEFAULT_EVERY if every is None else every
        if self.every < 1:
            raise ValueError(f"checkpoint_every must be positive, got {every}")
        rank = torch.distributed.get_rank() if sharding.processes() > 1 else 0
        name = f"laplace_{one.name}_{rank}_of_{sharding.processes()}.safetensors"
        self.path = Path(folder) / name
        self.tensors = one.tensors
        basis = exact_fingerprint((str(i), tensor) for i, tensor in enumerate(one.basis))
        owner = [type(la).__name__, la.arguments(), identity(la), basis]
        self.owner = json.dumps(owner, sort_keys=True)

    def write(self, sums: Sums, complete: bool = False) -> None:
        """Write the sums, if it is time to.

        Args:
            sums: The sums so far.
            complete: Whether the pass has ended, after which it is always time.
        """
        due = sums.batches % self.every == 0  # at the end of a pass it has been written then
        if sums.state is None or due == complete:
            return
        tensors = {str(i): t.cpu() for i, t in enumerate(self.tensors(sums.state))}
        numbers = {"loss": sums.loss.hex(), "n": str(sums.n), "batches": str(sums.batches)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, save(tensors, metadata={**numbers, "owner": self.owner}))

    def read(self) -> tuple[Sums, list[torch.Tensor]] | None:
        """Return what an interrupted pass had added up, and its tensors; ``None`` if there is none.

        Raises:
            ValueError: If the file is damaged, or belongs to another model or to other arguments.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                numbers = file.metadata() or {}
                tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
            sums = Sums(
                None, float.fromhex(numbers["loss"]), int(numbers["n"]), int(numbers["batches"])
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it to start anew") from None
        if numbers["owner"] != self.owner:
            raise ValueError(
                f"{self.path} belongs to a fit of another model or with other arguments; delete it "
                "to start anew"
            )
        return sums, tensors

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
