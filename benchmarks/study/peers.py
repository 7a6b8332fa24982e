"""Every method on the same checkpoints: class probabilities, computed once and kept.

The methods are those of `bench`, where it says what was fixed in advance; "ensemble" averages
`MEMBERS` trainings of a cell, those of further seeds among them. A checkpoint that is not there yet
is trained first.

    python -m benchmarks.study.peers --data DATA --out OUT --workers 2

A method's probabilities are kept in ``peers`` beside each checkpoint, with the seconds it took and
the bytes it stores; what is there is not computed again, so a run may be interrupted. Seconds are
this process's own on a CPU, and kept only where no other worker shared an accelerator; seconds to
calibrate come on top of the fit's. `peer_tables` makes the tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.arguments import prepare
from benchmarks.harness.kept import read, replacing, write
from benchmarks.harness.report import write_report
from benchmarks.study.bench import ENCODER_ONLY, METHODS, ON_KFAC, PROBIT, Bench
from benchmarks.study.checkpoints import checkpoint
from benchmarks.study.costs import Stopwatch, stored_bytes
from benchmarks.study.peer_tables import Cell, tables_of
from benchmarks.study.retrained import SampledAdapter
from benchmarks.study.trainings import SEEDS, Training, checkpoint_parser, in_order
from laplace_lora import LogitsModel
from laplace_lora.evaluation import MAP

FOLDER = "peers"
LABELS = "labels"
ENSEMBLE = "ensemble"
MEMBERS = {"encoder": 5, "decoder": 3}  # a training of the decoder takes 20 minutes of a CPU


def compute(training: Training, args: argparse.Namespace, names: list[str]) -> list[str]:
    """Compute the methods of a checkpoint that are not there yet.

    Returns:
        What failed, as checkpoint and method; the other methods are computed all the same.
    """
    folder = args.out / "checkpoints" / training.name / FOLDER
    # K-FAC comes before the methods that share it, or its own fit would take no time.
    missing = [name for name in METHODS if name in names and not _path(folder, name).exists()]
    if training.model == "decoder" and ENCODER_ONLY in missing:
        missing.remove(ENCODER_ONLY)
    if not missing:
        return []
    task, how = training.load(args.data, args.out, args.device)
    model, _ = checkpoint(task, how, training.seed)
    bench = Bench(task, LogitsModel(model, task.target_ids), how, training.seed)
    labels = {
        split: torch.tensor([row["labels"] for row in task.splits[split]])
        for split in task.evaluated
    }
    with replacing(_path(folder, LABELS)) as file:
        save_file(labels, file)
    failed = []
    for name in missing:
        try:
            _compute_one(bench, training, name, folder, alone=args.workers == 1)
        except Exception:  # the other methods may work
            traceback.print_exc()
            failed.append(f"{training.name}: {name}")
    return failed


def _compute_one(bench: Bench, training: Training, name: str, folder: Path, alone: bool) -> None:
    """Compute and keep the probabilities of one method."""
    if name in ON_KFAC:
        bench.kfac()  # before the watch starts, also where another process computed K-FAC
    watch = Stopwatch(bench.args.device)
    method = METHODS[name](bench)
    fit = watch.lap()
    predict = partial(method, link_approx="probit") if name == PROBIT else method
    probs, seconds = {}, {}
    for split in bench.task.evaluated:
        watch = Stopwatch(bench.args.device)
        parts = [predict(batch) for batch in bench.loader(split)]
        probs[split] = torch.cat(parts).detach().float().cpu().contiguous()
        seconds[split] = watch.lap()
    cost = {"bytes": float(_stored(method))}
    if alone or torch.device(bench.args.device).type == "cpu":
        cost |= {"fit": fit, "predict": seconds["test"]}
    write(_path(folder, name).with_suffix(".json"), cost)
    with replacing(_path(folder, name)) as file:  # the last, by which a method counts as finished
        save_file(probs, file)
    tuning = f"; {method.tuning}" if getattr(method, "tuning", None) else ""
    print(f"{training.name}: {name}, {fit:.0f} s, {seconds['test']:.0f} s{tuning}", flush=True)


def _stored(method: object) -> int:
    if isinstance(method, SampledAdapter):
        return method.bytes
    return 0 if isinstance(method, MAP) else stored_bytes(method)


def compute_all(trainings: list[Training], args: argparse.Namespace, names: list[str]) -> list[str]:
    """Compute what is missing, in several processes if asked; return what failed."""
    if args.workers == 1:
        return [each for training in trainings for each in compute(training, args, names)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Bench.__module__])
    failed = []
    with ProcessPoolExecutor(args.workers, context, prepare, (args,)) as pool:
        jobs = {pool.submit(compute, each, args, names): each for each in trainings}
        for job in as_completed(jobs):
            try:
                failed += job.result()
            except (Exception, SystemExit) as error:  # the other checkpoints may work
                traceback.print_exc()
                failed.append(f"{jobs[job].name}: {error}")
    return failed


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield what is finished, of the further members of ensembles, too."""
    for training in [*wanted(args), *further_members(wanted(args))]:
        folder = args.out / "checkpoints" / training.name / FOLDER
        if not _path(folder, LABELS).exists():
            continue
        labels = load_file(_path(folder, LABELS))
        for name in METHODS:
            if _path(folder, name).exists():
                cost = read(_path(folder, name).with_suffix(".json"))
                probs = load_file(_path(folder, name))
                yield Cell(training.name, name, labels, probs, cost)


def with_ensembles(found: list[Cell]) -> list[Cell]:
    """Return the cells of the study's seeds and, where all members are there, their average.

    An ensemble has no seed; its probabilities stand beside every seed of its cell.
    """
    studied = [cell for cell in found if cell.seed in SEEDS]
    maps = [cell for cell in found if cell.method == "MAP"]
    ensembles = []
    for group in dict.fromkeys(cell.group for cell in maps):
        members = [cell for cell in maps if cell.group == group]
        if len(members) < MEMBERS[group.partition("-")[0]]:
            continue
        probs = {
            split: torch.stack([member.probs[split] for member in members]).mean(0)
            for split in members[0].probs
        }
        cost: dict[str, float] = {"bytes": 0.0}
        if all("predict" in member.cost for member in members):
            cost |= {"fit": 0.0, "predict": sum(member.cost["predict"] for member in members)}
        ensembles += [
            Cell(member.name, ENSEMBLE, member.labels, probs, cost)
            for member in members
            if member.seed in SEEDS
        ]
    return [*studied, *ensembles]


def further_members(trainings: list[Training]) -> list[Training]:
    """Return the trainings that only the ensembles of some trainings' cells need."""
    more = {
        replace(each, seed=seed): None
        for each in trainings
        for seed in range(MEMBERS[each.model])
        if seed not in SEEDS
    }
    return list(more)


def wanted(args: argparse.Namespace) -> list[Training]:
    """Return the trainings that the arguments name, a seed after the other."""
    chosen = [each for each in in_order() if each.name.startswith(tuple(args.only))]
    return sorted(chosen, key=lambda training: training.seed)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"


def main() -> None:
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=1, help="checkpoints at a time")
    args = parser.parse_args()
    prepare(args)
    failed = []
    if not args.report:
        failed = compute_all(wanted(args), args, args.methods)
        if "MAP" in args.methods:
            failed += compute_all(further_members(wanted(args)), args, ["MAP"])
    tables, raw = tables_of(with_ensembles(list(cells(args))))
    write_report("study.peers", args, tables, raw)
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
