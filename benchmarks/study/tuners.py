"""Other tuners than LoRA: what leave-one-out and the evidence make of the MAP.

The quickstart's encoder is trained with AdaLoRA (no ranks are allocated), VeRA, IA³, LoHa and OFT
on 400 rows, briefly and for long; rates and sizes below were fixed before any test row was read.
One K-FAC posterior, with diagonal blocks for what it does not cover, is tuned by leave-one-out and
by the evidence, which was the default for these tuners. Temperature scaling of the MAP reads 200
labels of its own. The rule: leave-one-out becomes the default if its mean test NLL is below the
evidence's, and no cell's mean is above the MAP's by more than 0.005 nats.

    python -m benchmarks.study.tuners --data DATA --out OUT

What is finished is kept in ``tuners`` in ``--out``, and not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, IA3Config, LoHaConfig, OFTConfig, VeraConfig, get_peft_model
from transformers import set_seed

from benchmarks.harness.arguments import prepare
from benchmarks.harness.kept import figures_of, keep
from benchmarks.harness.report import mean_and_error, write_report
from benchmarks.study.checkpoints import base_model
from benchmarks.study.judging import FIT_BATCH
from benchmarks.study.small_trainings import WAYS, figures_parser, judged, train, tuned
from benchmarks.study.tasks import Task, add_task_arguments, load_task, settings_of
from benchmarks.study.trainings import EPOCHS, EVALUATION_BATCH, SEEDS
from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.evaluation import MAP, TemperatureScaling

LAYERS = [4, 5]  # with adapters, the last two of six
ATTENTION = [f"layer.{layer}.attention.self." for layer in LAYERS]
QUERY_VALUE = [prefix + name for prefix in ATTENTION for name in ("query", "value")]
OUTPUT = [f"layer.{layer}.output.dense" for layer in LAYERS]
KEY_VALUE = [prefix + name for prefix in ATTENTION for name in ("key", "value")]
TUNERS: dict[str, tuple[Any, dict[str, Any], float]] = {  # class, arguments and rate
    "adalora": (AdaLoraConfig, {"init_r": 8, "target_r": 8, "total_step": 10**6}, 1e-2),
    "vera": (VeraConfig, {"r": 64}, 1e-2),
    "ia3": (IA3Config, {"target_modules": KEY_VALUE + OUTPUT, "feedforward_modules": OUTPUT}, 1e-2),
    "loha": (LoHaConfig, {"r": 8}, 2e-3),
    "oft": (OFTConfig, {"r": 0, "oft_block_size": 32}, 2e-3),
}
TASKS = ("sst2", "trec6")
LENGTHS = ("short", "long")
SIZES = {"train_size": 400, "val_size": 200, "test_size": 500, "shifted_size": 300}


def figures(task: Task, tuner: str, length: str, seed: int) -> dict[str, Any]:
    """Train a checkpoint; return NLL and accuracy of every way on test and shifted rows."""
    kind, options, rate = TUNERS[tuner]
    set_seed(seed)
    model = get_peft_model(
        base_model(task), kind(**{"task_type": "SEQ_CLS", "target_modules": QUERY_VALUE} | options)
    )
    loss = train(model, task.loader("train", EVALUATION_BATCH), EPOCHS["encoder", length], rate)
    logits = LogitsModel(model)
    splits = [split for split in ("test", "shifted") if split in task.splits]
    found: dict[str, Any] = {"final loss": loss}

    def judge(name: str, method: Any, **more: Any) -> None:
        found[name] = {s: judged(method, task.loader(s, EVALUATION_BATCH)) for s in splits} | more

    judge("MAP", MAP(logits))
    judge("temperature scaling", TemperatureScaling(logits, task.loader("val", EVALUATION_BATCH)))
    la = KronLoraLaplace(logits, "classification", uncovered="diag")
    la.fit(task.loader("train", FIT_BATCH))
    for name, way in WAYS.items():
        more = tuned(la, way)
        judge(name, la, **more)
    return found


def names() -> Iterator[tuple[int, str, str, str]]:
    """Yield seed, task, tuner and length of every training."""
    for seed in SEEDS:
        for task in TASKS:
            for tuner in TUNERS:
                for length in LENGTHS:
                    yield seed, task, tuner, length


def rows_of(found: dict[str, dict[str, Any]], split: str) -> list[dict[str, str]]:
    """Return the MAP's NLL of every cell and paired differences from it, over the seeds."""
    table = []
    for cell in dict.fromkeys(name.rpartition("-")[0] for name in found):
        results = [each for name, each in found.items() if name.rpartition("-")[0] == cell]
        if any(split not in each["MAP"] for each in results):
            continue
        accuracy = [each["MAP"][split]["accuracy"] for each in results]
        nll = [each["MAP"][split]["NLL"] for each in results]
        row = {"training": cell, "seeds": str(len(results))}
        row |= {"accuracy": mean_and_error(accuracy), "MAP": mean_and_error(nll)}
        for way in ("temperature scaling", *WAYS):
            values = [e[way][split]["NLL"] - e["MAP"][split]["NLL"] for e in results]
            row[way] = mean_and_error(values)
        table.append(row)
    return table


def main() -> None:
    parser = figures_parser(__doc__, "vera or ia3-trec6-long")
    add_task_arguments(parser, TASKS)
    parser.set_defaults(**SIZES)
    args: argparse.Namespace = parser.parse_args()
    prepare(args)
    folder: Path = args.out / "tuners"
    settings = settings_of(args, ("train", "val", "test", "shifted"))
    load = cache(partial(load_task, args))
    found = {}
    for seed, task, tuner, length in names():
        name = f"{tuner}-{task}-{length}-{seed}"
        path = folder / f"{name}.json"
        if not path.exists() and not args.report and name.startswith(tuple(args.only)):
            keep(path, settings, figures(load(task), tuner, length, seed))
            print(name, path.read_text(), flush=True)
        if path.exists():
            found[name] = figures_of(path, settings)
    tables = {
        f"{split.capitalize()} NLL": rows_of(found, split) for split in ("test", "shifted") if found
    }
    write_report("study.tuners", args, tables, found)


if __name__ == "__main__":
    main()
