"""The steps of `speed.gpu`: what each measures, at which size."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.harness.llama import (
    Workload,
    bare_passes,
    make_workload,
    peer_kron_runs,
    random_llama,
)
from benchmarks.harness.memory import MIB, ROOT, peak_of_run
from benchmarks.harness.report import verdict
from benchmarks.harness.timing import Run, ratio, time_in_turn
from benchmarks.speed import generation
from benchmarks.speed.fit import library_runs
from benchmarks.speed.predict import fitted
from laplace_lora import KronLoraLaplace
from laplace_lora.curvature.batch_curvature import add_factors

Rows = list[dict[str, Any]]
Tables = dict[str, Rows]  # by heading; steps fill them as they go
FIT_AT_MOST, PREDICT_AT_MOST, GIB_AT_MOST = 1.10, 1.25, 1.5
LANGUAGE_AT_MOST = 1.3
LOW_RANK = ("low-rank",)


def shape(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int) -> Any:
    """Return the size arguments of a Llama."""
    return {
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "intermediate": inner,
        "vocab": vocab,
    }


SHAPES = {
    "tiny": shape(64, 2, 4, 2, 128, 500),
    "0.1 B": shape(576, 30, 9, 3, 1536, 49152),  # SmolLM2-135M
    "1 B": shape(2048, 16, 32, 8, 8192, 128256),  # Llama-3.2-1B
    "8 B": shape(4096, 32, 32, 8, 14336, 128256),  # Llama-3-8B
}


def sized(args: argparse.Namespace, size: str, **others: Any) -> argparse.Namespace:
    """Return the arguments with a model's shape and others; all shapes are tiny in a rehearsal."""
    own = argparse.Namespace(**vars(args))
    vars(own).update(SHAPES["tiny" if args.tiny else size])
    vars(own).update(others)
    if args.tiny:
        own.tokens, own.batch = min(own.tokens, 16), 2
        own.low_rank_threshold, own.factor_rank = 32, 8
    return own


def runnable(runs: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """Run every side once; return those that work, and the errors of the others."""
    good, failed = {}, {}
    for name, run in runs.items():
        try:
            run()
            good[name] = run
        except Exception as error:  # a peer may fail in any way
            text = str(error).splitlines() or [""]
            failed[name] = f"{type(error).__name__}: {text[0][:120]}"
        release()
    return good, failed


def release() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(
    bare: Run, runs: dict[str, Run], limits: dict[str, float], args: argparse.Namespace
) -> tuple[Rows, Any]:
    """Time runs against bare passes, and read peaks.

    Args:
        bare: What the others' times and peaks are divided by.
        runs: By name.
        limits: The most that a run's time may be, by the first word of its name.
        args: Repeats, clock and device.
    """
    good, failed = runnable(runs)
    seconds = time_in_turn({"bare": bare, **good}, args)
    rows: Rows = []
    for name, run in {"bare": bare, **runs}.items():
        if name in failed:
            rows.append(line(name, times=failed[name]))
            continue
        cost = ratio(seconds[name], seconds["bare"])
        limit = limits.get(name.split(",")[0])
        rows.append(
            line(
                name,
                f"{statistics.median(seconds[name]):.3f} s",
                "1" if name == "bare" else str(cost),
                "-" if limit is None else f"{limit}: {verdict(cost.median, at_most=limit)}",
                f"{peak_of_run(run, args.device, 'records') / MIB:.0f}",
            )
        )
    return rows, {"seconds": seconds, "failed": failed}


def line(
    side: str,
    figure: str = "-",
    times: str = "-",
    limit: str = "-",
    peak: str = "-",
) -> dict[str, Any]:
    """Return one row of a table."""
    return {
        "side": side,
        "median": figure,
        "times bare": times,
        "at most": limit,
        "peak, MiB": peak,
    }


def factor_gib(work: Workload, args: argparse.Namespace) -> float:
    """Return the size of a fit's running sums, in GiB."""
    sums_of = library_runs(work, args, fresh=True, kinds=LOW_RANK)["fit, low-rank"]
    sums: Any = sums_of()
    return float(sum(tensor.nbytes for tensor in sums[1].tensors()) / 2**30)


def fit_and_predict(
    size: str, args: argparse.Namespace, tables: Tables, peers: bool = False, **others: Any
) -> Any:
    """Measure a batch of a fit and of a prediction, for 2 and 4 classes."""
    args = sized(args, size, **others)
    model = random_llama(args)
    raw: dict[str, Any] = {}
    for classes in args.classes:
        work = make_workload(model, args, classes)
        fits: dict[str, Run] = {
            "fit, low-rank": library_runs(work, args, kinds=LOW_RANK)["fit, low-rank"]
        }
        if peers and classes == 4:
            fits |= {f"{name}.kron": run for name, run in peer_kron_runs(work).items()}
        name = f"{size}, {others.get('quantised', args.dtype)}, {classes} classes"
        limits = {"fit": FIT_AT_MOST, "predict": PREDICT_AT_MOST}
        heading = f"Fit, {name}, against a forward and {classes - 1} backward passes"
        tables[heading], raw[heading] = compare(
            lambda work=work, n=classes - 1: bare_passes(work, n), fits, limits, args
        )
        gib = factor_gib(work, args)
        limit = f"{GIB_AT_MOST}: {verdict(gib, at_most=GIB_AT_MOST)}"
        tables[heading].append(line("factors", f"{gib:.2f} GiB", limit=limit))
        la = fitted(work, args, args.factor_rank)
        inputs = {key: value for key, value in work.batch.items() if key != "labels"}
        runs: dict[str, Run] = {
            "predict, moments of all outputs": partial(la._glm_predictive_distribution, inputs)
        }
        heading = f"Predict, {name}, against a forward and {classes} backward passes"
        tables[heading], raw[heading] = compare(
            lambda work=work, n=classes: bare_passes(work, n), runs, limits, args
        )

        def forward(work: Workload = work, inputs: Any = inputs) -> Any:
            with torch.no_grad():
                return work.model(inputs)

        heading = f"Predict, {name}, by the default link, in forward passes"
        tables[heading], raw[heading] = compare(
            forward, {"probabilities": partial(la, inputs)}, {}, args
        )
    return raw


def padded_fit(size: str, args: argparse.Namespace, tables: Tables) -> Any:
    """Measure a batch of a fit, of which half the texts are padded by a quarter."""
    args = sized(args, size)
    work = make_workload(random_llama(args), args, 2)
    work.batch["attention_mask"][::2, -(args.tokens // 4) :] = 0
    heading = f"Fit, {size}, {args.dtype}, 2 classes, half of the texts padded by a quarter"
    fits = {"fit, low-rank": library_runs(work, args, kinds=LOW_RANK)["fit, low-rank"]}
    bare = partial(bare_passes, work, 1)
    tables[heading], raw = compare(bare, fits, {"fit": FIT_AT_MOST}, args)
    return {heading: raw}


def language_fit(size: str, args: argparse.Namespace, tables: Tables) -> Any:
    """Measure a batch of a language model's fit against its own forward and backward pass."""
    args = sized(args, size)
    model = random_llama(args)
    work = make_workload(model, args, 2)
    batch = {**work.batch, "labels": work.batch["input_ids"]}
    la = KronLoraLaplace(
        model,
        "language_modeling",
        factor_rank=args.factor_rank,
        low_rank_threshold=args.low_rank_threshold,
    )
    x, y = la.engine.objective.split(batch, "labels", la.engine.device, la.engine.dtype)
    spec = la.structure.spec
    sums = add_factors(la.engine, x, y, spec)[1]
    weights = [p for p in model.parameters() if p.requires_grad]

    def own() -> Any:
        return torch.autograd.grad(model(**batch).loss, weights)

    runs = {"fit, low-rank": lambda: add_factors(la.engine, x, y, spec, sums)}
    heading = f"Fit of a language model, {size}, {args.dtype}, against its forward and backward"
    tables[heading], raw = compare(own, runs, {"fit": LANGUAGE_AT_MOST}, args)
    return {heading: raw}


def generating(size: str, args: argparse.Namespace, tables: Tables) -> Any:
    """Measure sampled generation against plain cached generation, and scoring."""
    lengths = [4, 16] if args.tiny else [64, 1024]
    args = sized(args, size, samples=16, new=8, lengths=lengths, exact_places=2, scored=[96])
    model = random_llama(args)
    generator = torch.Generator().manual_seed(args.seed)
    text = torch.randint(args.vocab, (1, max(*lengths, 96)), generator=generator).to(args.device)
    la = generation.fitted(model, text)
    name = f"{size}, {args.dtype}"
    tables[f"Generation, {name}"], raw = generation.generation_rows(model, la, text, args)
    tables[f"Scoring, {name}"], scored = generation.scoring_rows(model, la, text, args)
    return {"generation": raw, "scoring": scored}


def gpu_tests(args: argparse.Namespace, tables: Tables) -> Any:
    """Run the tests that need an accelerator."""
    if torch.device(args.device).type == "cpu":
        os.environ["LAPLACE_LORA_TEST_DEVICE"] = "cpu"
    tests = str(ROOT / "tests" / "project" / "test_accelerator.py")
    options = ["-q", "-n", "0", "-m", "gpu", "-rfs", "-W", "default", "-p", "no:cacheprovider"]
    counts = Counts()
    status = int(pytest.main([*options, *args.tests, tests], plugins=[counts]))
    tables["Tests"] = [{**counts.outcomes, "exit status": status}]
    return dict(counts.outcomes)


class Counts:
    """A plugin that counts the outcomes of tests."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count one phase of a test."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1


STEPS: dict[str, Callable[[argparse.Namespace, Tables], Any]] = {
    "tests": gpu_tests,
    "8 B": partial(fit_and_predict, "8 B"),
    "8 B in 4 bits": partial(fit_and_predict, "8 B", quantised="4 bits"),
    "padding": partial(padded_fit, "1 B"),
    "1 B": partial(fit_and_predict, "1 B", peers=True),
    "0.1 B": partial(fit_and_predict, "0.1 B", peers=True),
    "generation": partial(generating, "1 B"),
    "language modelling": partial(language_fit, "1 B"),
}
