"""Peak memory of a benchmark's sides, each in a process of its own.

On an accelerator a reading is the caching allocator's own peak. On the CPU there are two:
``records``, the peak of torch's record of every CPU allocation and release (exact and repeatable,
blind to what is not allocated by torch), and ``resident``, the peak of the process's resident set
above its level before the run (sees everything, in pages, Linux only). See `timing` for times.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.timing import Run

ROOT = Path(__file__).parents[2]
MIB = 2**20
READINGS = ("records", "resident")


def peak_of_run(run: Run, device: str, reading: str) -> int:
    """Run once and return the peak of the bytes held above the level before the run.

    Args:
        run: What to run. Its result counts: it is still in memory at the end of the reading.
        device: Where the memory is read.
        reading: On the CPU, ``records`` or ``resident`` (see the module's text). An accelerator
            has its allocator's own peak and ignores this.

    Returns:
        Peak bytes.
    """
    gc.collect()
    if torch.device(device).type != "cpu":
        module = torch.get_device_module(torch.device(device))
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        result = run()
        module.synchronize()
        peak = module.max_memory_allocated() - before
    elif reading == "resident":
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak
        before = _kernel_bytes("VmRSS")
        result = run()
        peak = _kernel_bytes("VmHWM") - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
            result = run()
        peak = _recorded_peak(recorder)
    del result
    return peak


def _kernel_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _recorded_peak(recorder: profile) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    level = peak = 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak


def peaks_in_own_processes(
    name: str, sides: Iterable[str], device: str
) -> dict[str, dict[str, int]]:
    """Start this benchmark anew for every side and reading, and collect the peaks.

    Args:
        name: Of the benchmark's module below ``benchmarks``; it must have the arguments of
            `arguments.add_memory_arguments`.
        sides: Names that the benchmark's ``--peak-of`` knows.
        device: Where the memory is read; an accelerator has one reading only.

    Returns:
        Peak bytes by side and reading.

    Raises:
        RuntimeError: If a process fails; its error output is in the message.
    """
    # Fixed thresholds make the C allocator hand freed blocks back to the kernel at once.
    environment = dict(
        os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_ARENA_MAX="1"
    )
    readings = READINGS if torch.device(device).type == "cpu" else READINGS[:1]
    peaks: dict[str, dict[str, int]] = {}
    for side in sides:
        for reading in readings:
            command = [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]
            command += ["--peak-of", side, "--peak-by", reading]
            done = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise RuntimeError(f"reading the peak of {side} failed:\n{done.stderr}")
            peaks.setdefault(side, {})[reading] = int(done.stdout.split()[-1])
    return peaks


def cells_above(peaks: dict[str, dict[str, int]], side: str, reference: str) -> dict[str, str]:
    """Return a side's cells by reading: its peak in MiB above that of another side."""
    return {
        f"MiB above {reference} ({reading})": f"{(peak - peaks[reference][reading]) / MIB:.1f}"
        for reading, peak in peaks[side].items()
    }
