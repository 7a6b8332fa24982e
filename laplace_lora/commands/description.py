"""What ``laplace-lora info`` does."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load
from torch import Tensor

from laplace_lora.commands.reading.columns import listed
from laplace_lora.commands.reading.plan import read_plan
from laplace_lora.display.tables import short, span
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.storage.files import read_files
from laplace_lora.storage.identity import BUFFERS, IN_USE
from laplace_lora.storage.same_function import SETTINGS
from laplace_lora.structures.sizes import MIB, kron_size

FINGERPRINTS = ("weights", "adapter", "base", IN_USE, BUFFERS, SETTINGS)
SUMMED = ("weights", "tensors")
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
            console.print(_table(title, _by_layer(values) if title == "covers" else values))


def describe(posterior: str) -> dict[str, dict[str, Any]]:
    """Return what a saved posterior is, by topic; it lies in a folder or a repository.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its files are damaged.
    """
    payload, config = read_files(posterior)
    tensors = load(payload)
    plan = read_plan(posterior, config["content"])
    noise = {"observation noise": float(tensors["sigma_noise"])}
    scalars, shapes = config["scalars"], config["parameters"]
    arguments = {k: v for k, v in config["arguments"].items() if v not in (None, {}, [])}
    is_known = likelihood_of(config["arguments"]["likelihood"]).counts_model_outputs
    outputs = {"outputs": scalars["n_outputs"]} if is_known else {}
    return {
        "posterior": {
            "class": config["class"],
            "backend": config["backend"],
            **arguments,
            "examples": scalars["n_data"],
            **outputs,
            "mean training loss": scalars["loss"] / scalars["n_data"],
        },
        "covers": {
            **dict(zip(SUMMED, (sum(map(math.prod, shapes.values())), len(shapes)), strict=True)),
            **{name: " x ".join(map(str, shape)) for name, shape in shapes.items()},
        },
        "prior and calibration": {
            "prior precision": span(tensors["prior_precision"], 4),
            "prior mean": "given weights" if bool(tensors["prior_mean"].any()) else "zero",
            **(noise if config["arguments"]["likelihood"] == "regression" else {}),
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
        vectors = {
            n.split(".")[1]: t.numel() for n, t in tensors.items() if n.endswith(".diagonal")
        }
        blocks = zip(config["parameters"].values(), config["curvature"], strict=True)
        # A vector has no side, also where it is the diagonal of a whole tensor.
        sides = [
            [d for d, number in zip(shape, block, strict=False) if str(number) not in vectors]
            if len(shape) == len(block) or str(block[0]) in vectors
            else list(shape)
            for shape, block in blocks
        ]
        return 4 * (kron_size(sides, spec) + sum(vectors.values()))
    return 4 * sum(t.numel() for name, t in tensors.items() if name.startswith("curvature."))


def _table(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for topic, value in values.items():
        for name, text in _rows(topic, value):
            table.add_row(Text(name), Text(text[:SHOWN] if title == "fingerprints" else text))
    return table


def _by_layer(covered: dict[str, Any]) -> dict[str, Any]:
    """Return what is covered with one entry for tensors that layers have alike."""
    found = dict(covered)
    kinds: Counter[tuple[str, str]] = Counter()
    for name in [name for name in covered if name not in SUMMED]:
        kinds[layer_name(name), found.pop(name)] += 1
    shapes = {f"{name}, {shape}": count for (name, shape), count in kinds.items()}
    return found | shapes


def _rows(name: str, value: Any) -> list[tuple[str, str]]:
    """Return what a person reads of a value; what a mapping leaves out has no row."""
    if isinstance(value, dict):
        return [(f"{name}, {k}", short(v)) for k, v in value.items() if v is not None]
    if isinstance(value, bool):
        return [(name, "yes" if value else "no")]
    if isinstance(value, list):  # of answers, in which spaces count
        return [(name, listed(value))]
    return [(name, short(value))]


def layer_name(tensor: str) -> str:
    """Return a tensor's name with a star for each number of a layer.

    What this library and PEFT put around the model's own names is left out.
    """
    bare = tensor.removeprefix("model.").removeprefix("base_model.model.")
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", bare).replace(".default", "")
