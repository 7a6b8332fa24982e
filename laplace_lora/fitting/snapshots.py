"""Sums of an unfinished pass in a file, so that an interrupted fit can go on."""

from __future__ import annotations

import json
import os
import re
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from laplace_lora.curvature.backends import LoraGGN
from laplace_lora.data.shares import is_main, processes
from laplace_lora.data.tally import fingerprints
from laplace_lora.display.warning import warn
from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.storage.fingerprint import exact_fingerprint
from laplace_lora.storage.identity import check_identity, identity, known_identity
from laplace_lora.storage.whole_files import write_whole
from laplace_lora.structures.posterior import Posterior

DEFAULT_EVERY = 100  # batches
IDENTITY = "identity"
BACKEND = "backend"
UNNAMED = f"{LoraGGN.__module__}.{LoraGGN.__qualname__}"  # of files that name none


class Snapshot:
    """The sums so far in a file.

    Args:
        folder: Where the file is kept, one per process.
        every: Batches from one writing to the next; 100 if ``None``.
        posterior: What is being fitted; the file is for its weights, arguments and backend only.
        data_pass: The pass whose sums are kept; the file is for its basis only.

    Raises:
        ValueError: If ``every`` is not positive.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: int | None,
        posterior: Posterior,
        data_pass: Pass,
    ) -> None:
        self.every = DEFAULT_EVERY if every is None else every
        if self.every < 1:
            raise ValueError(f"checkpoint_every must be positive, got {every}")
        rank = torch.distributed.get_rank() if processes() > 1 else 0
        name = f"laplace_{data_pass.name}_{rank}_of_{processes()}.safetensors"
        self.path = Path(folder) / name
        self.tensors = data_pass.tensors
        basis = exact_fingerprint((str(i), tensor) for i, tensor in enumerate(data_pass.basis))
        self._posterior = posterior
        owner = {
            "kind": posterior.kind,
            "arguments": posterior.arguments,
            "basis": basis,
            BACKEND: posterior.backend_name,
            IDENTITY: identity(posterior),
        }
        self.owner = json.dumps(owner, sort_keys=True)
        self._seen = ""  # a digest of the batches so far
        self._expected: str | None = None  # of those whose sums are kept

    def see(self, batch: Any) -> None:
        """Take note of a batch, whether it is added up or skipped."""
        text = f"{self._seen} {fingerprints(batch)}"
        self._seen = blake2b(text.encode(), digest_size=16).hexdigest()

    def check_seen(self, batches: int, kept: int) -> None:
        """Check that the loader gives again what an interrupted pass has added up.

        Args:
            batches: How many it has given in this pass.
            kept: How many the interrupted pass had added up.

        Raises:
            ValueError: If it gives other examples, or fewer.
        """
        if batches < kept or self._expected not in (None, self._seen):
            what = f"only {batches}" if batches < kept else "other ones"
            raise ValueError(
                f"{self.path} holds the sums of {kept} batches, and the loader now gives {what}; "
                "use the data and the order of the interrupted fit (a fixed seed, where they are "
                "shuffled), or delete the file to start anew"
            )

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
        numbers["seen"] = self._seen
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, save(tensors, metadata={**numbers, "owner": self.owner}))

    def read(self) -> tuple[Sums, list[torch.Tensor]] | None:
        """Return what an interrupted pass had added up, and its tensors; ``None`` if there is none.

        Raises:
            ValueError: If the file is damaged, or is for another model, other arguments or another
                backend; one of an earlier version, which names none, is for `LoraGGN`.
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
            owner = _read_owner(numbers["owner"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it to start anew") from None
        self._check_owner(owner)
        self._expected = numbers.get("seen")  # files of earlier versions lack it
        return sums, tensors

    def _check_owner(self, saved: dict[str, Any]) -> None:
        """Refuse the sums of another fit.

        Raises:
            ValueError: If model, arguments or backend are others.
        """
        own = json.loads(self.owner)
        reason = None
        if saved[BACKEND] != own[BACKEND]:
            reason = f"its backend is {saved[BACKEND]}, this fit's {own[BACKEND]}"
        elif any(saved[name] != own[name] for name in ("kind", "arguments", "basis")):
            reason = "its class or arguments are others"
        else:
            found, _ = known_identity(self._posterior, saved[IDENTITY])
            try:
                check_identity(saved[IDENTITY], found)
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            raise ValueError(
                f"{self.path} belongs to a fit of another model or with other arguments "
                f"({reason}); delete it to start anew"
            )

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def point_out_other_counts(folder: str | os.PathLike[str]) -> None:
    """Warn, in the main process, of files that a fit in another number of processes has left.

    Each holds the sums of one process's share, of which another number of processes has none.

    Args:
        folder: Where a fit is about to keep its files.
    """
    count, found = processes(), {}
    for path in sorted(Path(folder).glob("laplace_*.safetensors")) if is_main() else []:
        match = re.fullmatch(r"laplace_.+_\d+_of_(\d+)\.safetensors", path.name)
        if match is not None and int(match[1]) != count:
            found[path.name] = int(match[1])
    if found:
        counts = " and ".join(map(_in_words, sorted(set(found.values()))))
        warn(
            f"{folder} holds sums of a fit that was interrupted in {counts}: {', '.join(found)}. "
            f"This one runs in {_in_words(count)} and cannot continue it, as each of these files "
            "is for one process's share of the data; it leaves them as they are. To continue, fit "
            "in as many processes as before; otherwise delete them"
        )


def _in_words(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def _read_owner(text: str) -> dict[str, Any]:
    """Return what a file says of the fit that it belongs to, those of earlier versions as well.

    Raises:
        ValueError: If it says nothing that can be read.
        KeyError: If it does not say all.
    """
    owner = json.loads(text)
    if isinstance(owner, list):  # of earlier versions
        owner = dict(zip(("kind", "arguments", IDENTITY, "basis"), owner, strict=True))
        owner[BACKEND] = UNNAMED
    return {name: owner[name] for name in ("kind", "arguments", "basis", BACKEND, IDENTITY)}
