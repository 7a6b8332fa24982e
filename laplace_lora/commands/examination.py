"""What ``laplace-lora doctor`` does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from laplace_lora.adapters.selection import listed
from laplace_lora.commands.description import layer_name
from laplace_lora.commands.fitting import new_posterior
from laplace_lora.commands.reading.adapter import load_asked
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.pairs import lengths_of
from laplace_lora.commands.reading.planning import plan_fit
from laplace_lora.commands.reading.rows import read_named
from laplace_lora.commands.reading.said import reading_said
from laplace_lora.commands.timing import fit_time, tuning_time
from laplace_lora.commands.training_warnings import warn_if_trained_otherwise
from laplace_lora.posteriors.base import LoraLaplace

NOT_WELL = 1  # exit status
SHOWN_KINDS = 30
BY = {"kron": "Kronecker factors", "full": "exact curvature", "diag": "diagonal"}  # is covered


def run(adapter: str, data: str | None, **options: Any) -> None:
    """Print what a fit would do; exit with status 1 if it would not succeed."""
    loaded = load_asked(adapter, options)
    console = Console()
    rows, named = (None, {}) if data is None else read_named(data, options["split"])
    plan = plan_fit(loaded, rows, options, named)
    problems: list[str] = []
    covering = new_posterior(loaded, plan, options["structure"], "diag", rows)
    _print_covered(console, covering, options["structure"])
    diagonal = _diagonal(covering)
    if rows is None:
        click.echo("Give --data for memory and time.")
    else:
        inputs = Inputs(loaded, plan)
        loader = inputs.loader(rows, options["batch_size"])
        click.echo(reading_said(inputs, rows, loader.dataset))
        warn_if_trained_otherwise(loaded, plan, rows, options)
        problems += _print_costs(console, covering, loader, options["batch_size"])
        # How often a layer runs, and on what, only the data show.
        shown = [name for name in _diagonal(covering) if name not in diagonal]
        diagonal += shown
        if shown and options["uncovered"] == "diag":
            click.echo(f"These data need a diagonal for {listed(shown)}, too.")
    if diagonal and options["uncovered"] == "error":
        problems.insert(
            0,
            f"K-FAC covers none of {listed(diagonal)}: --uncovered diag gives each a diagonal; or "
            "freeze them",
        )
    for problem in problems:
        click.echo(f"Problem: {problem}")
    if problems:
        click.get_current_context().exit(NOT_WELL)
    limits = ", as far as can be seen without data" if rows is None else ""
    click.echo(f"A fit is expected to succeed{limits}.")


def _diagonal(la: LoraLaplace) -> list[str]:
    """Return the tensors that Kronecker factors do not cover, as far as batches have shown."""
    maps = la.engine.maps
    return [block.name for block in la.engine.blocks if maps[block.map].is_diagonal]


def _print_covered(console: Console, la: LoraLaplace, structure: str) -> None:
    """Print the tensors that a posterior covers."""
    table = Table(title="Covered", title_justify="left")
    table.add_column("tensors", overflow="fold")
    for heading in ("shape", "how many", "by"):
        table.add_column(heading, no_wrap=True)
    engine, diagonal = la.engine, set(_diagonal(la))
    kinds: Counter[tuple[str, str, str]] = Counter()
    for block in engine.blocks:
        by = BY[structure]
        if structure == "kron" and block.name in diagonal:
            by = BY["diag"]
        kinds[layer_name(block.name), " x ".join(map(str, block.parameter.shape)), by] += 1
    for (name, shape, by), count in list(kinds.items())[:SHOWN_KINDS]:
        table.add_row(name, shape, str(count), by)
    left = sum(list(kinds.values())[SHOWN_KINDS:])
    if left:
        table.add_row("and others", "", str(left), "")
    console.print(table)
    model = la.logits_model.get_submodule("model")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    click.echo(f"{sum(engine.sizes):,} weights are covered; {frozen:,} are frozen.")


def _print_costs(
    console: Console, la: LoraLaplace, loader: DataLoader[Any], batch_size: int
) -> list[str]:
    """Print memory and time of a fit; return what speaks against it."""
    examples: Any = loader.dataset
    longest = sorted(examples, key=lambda example: max(lengths_of(example)))[-batch_size:]
    assert loader.collate_fn is not None
    estimate = la.estimate_memory(loader.collate_fn(longest), len(examples))
    console.print(estimate)
    if not estimate.fits:
        return [str(estimate)]
    time, batches = fit_time(la, loader, batch_size), -(-len(examples) // batch_size)
    click.echo(
        f"A fit of {len(examples)} rows in {batches} batches takes about {time.total:.0f} s "
        f"({time.per_batch:.2f} s a batch). {tuning_time(la)}"
    )
    return []
