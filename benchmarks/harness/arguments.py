"""Command-line arguments of the benchmarks, and what they set."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.harness.memory import READINGS
from benchmarks.harness.timing import CLOCKS

RESULTS = Path(__file__).parents[1] / "results"


def plain_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows a module's text as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def speed_parser(description: str, repeats: int = 7) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all speed benchmarks have."""
    parser = plain_parser(description)
    add_run_arguments(parser, repeats)
    add_clock_argument(parser)
    add_size_arguments(parser)
    return parser


def add_run_arguments(
    parser: argparse.ArgumentParser,
    repeats: int = 7,
    repeated: str = "timed rounds after the warm-up",
) -> None:
    """Add the arguments that every benchmark has.

    Args:
        parser: Where to add them.
        repeats: Default of ``--repeats``.
        repeated: What is repeated, for the help.
    """
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"]
    )
    parser.add_argument("--repeats", type=int, default=repeats, help=repeated)
    parser.add_argument(
        "--threads", type=int, default=1, help="more than one is only meaningful on idle cores"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the reports")


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the clock that times are taken from."""
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts this process's own time: on busy cores, with one thread",
    )


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which a benchmark calls itself to read one side's peak memory."""
    parser.add_argument("--peak-of", help="only run this side once, print its peak memory, stop")
    parser.add_argument(
        "--peak-by", choices=READINGS, default="records", help="how --peak-of reads the CPU"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the memory readings")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the model and of the batch."""
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--intermediate", type=int, help="default: 4 * hidden")
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA adapter")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--factor-rank", type=int, default=64)
    parser.add_argument(
        "--low-rank-threshold", type=int, default=256, help="longer sides are kept low-rank"
    )


def prepare(args: argparse.Namespace) -> None:
    """Set threads and seed, and refuse what would measure nothing.

    Raises:
        ValueError: If ``repeats`` or ``threads`` is not positive, or the processor's clock is asked
            for where it would add up threads or miss an accelerator.
    """
    if args.repeats < 1 or args.threads < 1:
        raise ValueError(
            f"--repeats and --threads must be positive, got {args.repeats} and {args.threads}"
        )
    if getattr(args, "clock", "wall") == "cpu" and (
        args.threads > 1 or torch.device(args.device).type != "cpu"
    ):
        raise ValueError("--clock cpu needs --threads 1 and --device cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
