"""The calibration study: Laplace posteriors and what else one would use, on real data.

A pretrained model is fine-tuned with LoRA on each task from several seeds, and every method is
evaluated on the same checkpoints: MAP, temperature scaling, Monte-Carlo dropout, an ensemble of all
seeds' adapters, and Laplace posteriors over the last layer, diagonal and K-FAC, tuned by marginal
likelihood without validation data; K-FAC also calibrated on the validation set. The split of the
data is the same for every seed; the test set is used for nothing but the table.

    python -m benchmarks.study --data DATA --autocast
    python -m benchmarks.study --data DATA --autocast --decoder --tasks sst2 rte trec6 --epochs 3
    python -m benchmarks.study --data DATA --tasks arc_easy --model path/to/decoder

``DATA`` has a folder per task with ``.jsonl`` files. Checkpoints and finished cells are saved under
``--out`` and never computed again; ``--full`` takes all rows there are. Seconds are this process's
own on the CPU, with one thread unless ``--threads`` says otherwise; "fit, epochs" divides those of
fitting and tuning by one pass of training in float32.
"""

from __future__ import annotations

import argparse

from benchmarks.harness.arguments import plain_parser, prepare
from benchmarks.harness.report import write_report
from benchmarks.study.cells import cells_of, draw, rows_of, run_cells, save_cell
from benchmarks.study.checkpoints import add_study_arguments
from benchmarks.study.methods import ENSEMBLE, ensemble
from benchmarks.study.tasks import CLASSIFICATION, add_task_arguments, load_task

EVERYTHING = 10**9


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = plain_parser(__doc__)
    add_task_arguments(parser, list(CLASSIFICATION))
    add_study_arguments(parser, seeds=[0, 1, 2, 3, 4])
    parser.add_argument("--dropout-samples", type=int, default=10, help="passes of MC dropout")
    parser.add_argument("--full", action="store_true", help="all rows there are")
    args = parser.parse_args()
    if args.full:
        args.train_size = args.test_size = args.shifted_size = EVERYTHING
    return args


def main() -> None:
    args = parse_arguments()
    prepare(args)
    tasks = [load_task(args, name) for name in args.tasks]
    if not args.report:
        for seed in args.seeds:
            for task in tasks:
                run_cells(task, args, seed)
        for task in tasks:
            if len(args.seeds) > 1 and ENSEMBLE not in cells_of(args, task.name):
                save_cell(task, args, "all", ENSEMBLE, ensemble(task, args), bootstrap=200)
    tables = {task.name: rows_of(task, args) for task in tasks if cells_of(args, task.name)}
    for task in tasks:
        draw(task, args)
    raw = {task.name: cells_of(args, task.name) for task in tasks}
    write_report("study", args, tables, raw)


if __name__ == "__main__":
    main()
