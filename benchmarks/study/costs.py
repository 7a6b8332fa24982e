"""What methods of a study cost: seconds, and bytes beside the fine-tuned model."""

from __future__ import annotations

from typing import Any

from benchmarks.study.checkpoints import clock_for


class Stopwatch:
    """Seconds of an accelerator, or of this process alone on a shared processor."""

    def __init__(self, device: str) -> None:
        self._clock = clock_for(device)
        self._started = self._clock()

    def lap(self) -> float:
        """Return the seconds since the last lap, or since the start."""
        now = self._clock()
        seconds, self._started = now - self._started, now
        return seconds


def stored_bytes(la: Any) -> int:
    """Return the bytes of a posterior's mean and curvature."""
    tensors, _ = la.structure.pack(la.fitted.state.curvature)
    return la.mean.nbytes + sum(tensor.nbytes for tensor in tensors.values())
