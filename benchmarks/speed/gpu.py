"""A run on an accelerator that needs no thought: tests, then costs at 0.1, 1 and 8 B parameters.

The models have the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3-8B, random weights in bfloat16
built on the device, and LoRA of rank 16 on all seven projections (adapters in float32, as PEFT
keeps them). "Bare" is a forward pass with the backward passes to the adapters' outputs that exact
curvature (classes - 1) or Jacobians (classes) need at least. Every side is timed in turn in one
process; peaks are the caching allocator's, above the level before the run. A peer that cannot run
is reported with its error.

Each step runs in a process of its own, in order of importance, and what it found is written at
once: a run that is cut short keeps what it has.

    python -m benchmarks.speed.gpu --minutes 6
    python -m benchmarks.speed.gpu --steps "8 B" --batch 8    # an accelerator with 80 GB
    python -m benchmarks.speed.gpu --device cpu --tiny        # a rehearsal
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import arguments
from benchmarks.harness.llama import ALL_PROJECTIONS
from benchmarks.harness.memory import ROOT
from benchmarks.harness.report import write_report
from benchmarks.speed.gpu_steps import STEPS

SHORTEST = 15  # seconds below which no step is begun


def run_step(step: str, seconds: float) -> dict[str, Any]:
    """Run one step in a process of its own.

    Args:
        step: Its name.
        seconds: The most it may take.

    Returns:
        ``tables`` and ``raw``; of a step that failed, a table that says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.json"
        command = [sys.executable, "-m", "benchmarks.speed.gpu", *sys.argv[1:]]
        command += ["--step", step, "--to", str(path)]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=seconds, stderr=subprocess.PIPE, text=True
            )
            reason = done.stderr.strip().splitlines()[-1:] or ["no output"]
            print(done.stderr[-3000:] if done.returncode else "", flush=True)
        except subprocess.TimeoutExpired:
            reason = [f"cut off after {seconds:.0f} s"]
        took = time.perf_counter() - start
        if path.exists():
            return {**json.loads(path.read_text()), "took": took}
        return {"tables": {step: [{"failed": reason[0][:200]}]}, "raw": reason, "took": took}


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=5)
    parser.add_argument("--minutes", type=float, default=6.0, help="when to stop")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny models")
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--step", choices=STEPS, help="only this one, in this process")
    parser.add_argument("--to", type=Path, help="where --step writes")
    parser.set_defaults(
        device="cuda",
        dtype="bfloat16",
        low_rank_threshold=512,
        tokens=256,
        batch=16,
        rank=16,
        targets=list(ALL_PROJECTIONS),
        quantised=None,
    )
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no accelerator here; --device cpu --tiny rehearses the run")
    arguments.prepare(args)
    if args.step:
        tables, raw = STEPS[args.step](args)
        args.to.write_text(json.dumps({"tables": tables, "raw": raw}))
        return
    end = time.perf_counter() + 60 * args.minutes
    tables, found = {}, {}
    for step in args.steps:
        left = end - time.perf_counter()
        if left < SHORTEST:
            tables[step] = [{"not run": "no time left"}]
            continue
        found[step] = run_step(step, left)
        tables |= found[step]["tables"]
        write_report("speed.gpu", args, tables, found)
    write_report("speed.gpu", args, tables, found)


if __name__ == "__main__":
    main()
