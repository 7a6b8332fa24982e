"""The study's checkpoints: a decoder and an encoder, each trained briefly and for long.

Three seeds each of SmolLM2-135M-Instruct, which answers with a token, and of the quickstart's
encoder, on 400 rows, or on 1000, with 500 others held out for validation. A long training is one of
its own, not a short one continued: the learning rate falls over its whole length. Trainings compute
under bfloat16 autocast, or in float32 where a processor would only emulate bfloat16.

    python -m benchmarks.study.trainings --data DATA --out OUT

What is finished is not trained again. Beside each checkpoint, ``map.json`` has the figures of the
MAP and of temperature scaling on the validation rows.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import RESULTS, plain_parser, prepare
from benchmarks.harness.half import has_bfloat16
from benchmarks.harness.kept import read, write
from benchmarks.harness.report import write_report
from benchmarks.study.checkpoints import add_study_arguments, checkpoint, folder_of
from benchmarks.study.tasks import Task, add_task_arguments, load_task
from laplace_lora import LogitsModel
from laplace_lora.evaluation import MAP, TemperatureScaling, evaluate

EPOCHS = {
    ("decoder", "short"): 3,
    ("decoder", "long"): 8,
    ("decoder", "large"): 3,
    ("encoder", "short"): 8,
    ("encoder", "long"): 15,
    ("encoder", "large"): 8,
}
SIZES = {"train-size": 400, "val-size": 500, "test-size": 500, "shifted-size": 300}
LARGE = 1000  # training rows of the checkpoints whose length is "large"
RATE = 1e-3
SEEDS = (0, 1, 2)
FIGURES = "map.json"
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Training:
    """One checkpoint.

    Attributes:
        model: ``"decoder"`` or ``"encoder"``.
        task: Name of the data set.
        length: ``"short"`` or ``"long"``; ``"large"`` is a short one on more rows.
        seed: Of head, adapter, batch order and dropout.
    """

    model: str
    task: str
    length: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the checkpoint."""
        return "-".join(map(str, vars(self).values()))

    def load(self, data: Path, out: Path, device: str = "cpu") -> tuple[Task, argparse.Namespace]:
        """Return the data of the training, and its arguments.

        Args:
            data: Folder with the tasks' folders.
            out: Folder with the ``checkpoints``.
            device: Where to compute.
        """
        parser = plain_parser("")
        add_task_arguments(parser, [self.task])
        add_study_arguments(parser, [self.seed])
        values: dict[str, Any] = {"data": data, "out": out, "device": device, **SIZES}
        values |= {"rate": RATE, "epochs": EPOCHS[self.model, self.length]}
        if self.length == "large":
            values["train-size"] = LARGE
        given = [f"--{name}={value}" for name, value in values.items()]
        if self.model == "decoder":
            given.append("--decoder")
        if has_bfloat16(device):
            given.append("--autocast")
        args = parser.parse_args(given)
        name = f"{self.model}-{self.task}-{self.length}"
        return replace(load_task(args, self.task), name=name), args


def in_order() -> list[Training]:
    """Return all trainings, the most wanted first."""

    def seeds(model: str, length: str, *tasks: str) -> list[Training]:
        return [Training(model, task, length, s) for task, s in itertools.product(tasks, SEEDS)]

    encoded, decoded = ("trec6", "sst2", "cola", "rte"), ("sst2", "trec6", "cola")
    wanted = [
        *seeds("encoder", "long", *encoded),
        *seeds("encoder", "short", *encoded),
        *seeds("decoder", "short", *decoded),
        *seeds("decoder", "long", *decoded),
        *seeds("encoder", "large", *encoded),
        *seeds("decoder", "large", *decoded),
        *seeds("decoder", "short", "rte", "arc_easy"),
        *seeds("decoder", "long", "rte", "arc_easy"),
    ]
    return list(dict.fromkeys(wanted))


def figures(training: Training, data: Path, out: Path, device: str) -> dict[str, Any]:
    """Train a checkpoint if needed; return its figures, MAP's and those of temperature scaling."""
    task, args = training.load(data, out, device)
    path = folder_of(task, args, training.seed) / FIGURES
    if not path.exists():
        model, record = checkpoint(task, args, training.seed)
        logits = LogitsModel(model, task.target_ids)
        scaled = TemperatureScaling(logits, task.loader("val", EVALUATION_BATCH))
        found: dict[str, Any] = {"temperature": scaled.temperature, **record}
        for name, method in {"MAP": MAP(logits), "temperature scaling": scaled}.items():
            for split in [split for split in ("val", "test", "shifted") if split in task.splits]:
                report = evaluate(method, task.loader(split, EVALUATION_BATCH), bootstrap=2)
                found[f"{name}, {split}"] = report.values
        write(path, found)
    return {"checkpoint": f"{task.name}-{training.seed}", **read(path)}


def row_of(found: dict[str, Any]) -> dict[str, str]:
    """Return a line of the table."""
    row = {"checkpoint": found["checkpoint"], "training loss": f"{found['final loss']:.3f}"}
    row["accuracy"] = f"{found['MAP, test']['accuracy']:.3f}"
    for split in ("test", "shifted"):
        for method, short in (("MAP", "MAP"), ("temperature scaling", "scaled")):
            values = found.get(f"{method}, {split}")
            cell = "-" if values is None else f"{values['NLL']:.3f} / {values['ECE']:.3f}"
            row[f"{split} NLL / ECE, {short}"] = cell
    row["temperature"] = f"{found['temperature']:.2f}"
    row["seconds"] = f"{found['seconds']:.0f}"
    return row


def checkpoint_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what a benchmark on the checkpoints takes."""
    parser = plain_parser(description)
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' folders")
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder of checkpoints")
    only = "checkpoints whose names start so, as decoder-sst2"
    parser.add_argument("--only", nargs="+", default=[""], help=only)
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.set_defaults(repeats=1, seed=0)
    return parser


def main() -> None:
    args = checkpoint_parser(__doc__).parse_args()
    prepare(args)
    rows = []
    for training in in_order():
        folder = args.out / "checkpoints" / training.name
        if not training.name.startswith(tuple(args.only)):
            continue
        if args.report and not (folder / FIGURES).exists():
            continue
        rows.append(row_of(figures(training, args.data, args.out, args.device)))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    write_report("study.trainings", args, {"Checkpoints": rows}, rows)


if __name__ == "__main__":
    main()
