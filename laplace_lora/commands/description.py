"""What ``laplace-lora info`` does."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from safetensors.torch import load
from torch import Tensor

from laplace_lora.commands.plan import read_plan
from laplace_lora.display.tables import span
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.storage.files import read_files
from laplace_lora.structures.sizes import MIB, kron_size

FINGERPRINTS = ("weights", "adapter", "base", "adapter_settings")
SHOWN = 12  # digits of a fingerprint in the table


def run(posterior: str, as_json: bool) -> None:
    """Print what a saved posterior is."""
    content = describe(posterior)
    if as_json:
        click.echo(json.dumps(content, indent=1))
        return
    console = Console()
    for title, values in content.items():
        if values:
            console.print(_table(title, values))


def describe(posterior: str) -> dict[str, dict[str, Any]]:
    """Return what a saved posterior is, by topic.

    Args:
        posterior: Folder or repository.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its files are damaged.
    """
    payload, config = read_files(posterior)
    tensors = load(payload)
    plan = read_plan(posterior, config["content"])
    scalars, shapes = config["scalars"], config["parameters"]
    arguments = {k: v for k, v in config["arguments"].items() if v not in (None, {}, [])}
    return {
        "posterior": {
            "class": config["class"],
            "backend": config["backend"],
            **arguments,
            "examples": scalars["n_data"],
            "outputs": scalars["n_outputs"],
            "mean training loss": scalars["loss"] / scalars["n_data"],
        },
        "covers": {
            "weights": sum(map(math.prod, shapes.values())),
            "tensors": len(shapes),
            **{name: " x ".join(map(str, shape)) for name, shape in shapes.items()},
        },
        "prior and calibration": {
            "prior precision": span(tensors["prior_precision"], 4),
            "prior mean": "given weights" if bool(tensors["prior_mean"].any()) else "zero",
            "covariance scale": scalars["covariance_scale"],
            "likelihood temperature": scalars["likelihood_temperature"],
            "mean moved": "shift" in tensors,
        },
        "size": {
            "file, MiB": len(payload) / MIB,
            "memory when loaded, about, MiB": _memory(config, tensors) / MIB,
        },
        "fingerprints": {name: config[name] for name in FINGERPRINTS if name in config},
        "data": {} if plan is None else {k: v for k, v in asdict(plan).items() if v is not None},
    }


def _memory(config: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """Return about how many bytes the curvature takes in single precision."""
    names = ("factor_rank", "low_rank_threshold", "residual")
    arguments = config["arguments"]
    if all(name in arguments for name in names):
        spec = FactorSpec(*(arguments[name] for name in names))
        return 4 * kron_size([list(shape) for shape in config["parameters"].values()], spec)
    return 4 * sum(t.numel() for name, t in tensors.items() if name.startswith("curvature."))


def _table(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, text[:SHOWN] if title == "fingerprints" else text)
    return table
