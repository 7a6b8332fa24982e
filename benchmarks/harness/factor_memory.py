"""Bytes of the curvature factors for the shapes of well-known models.

One decoder layer of the true widths is built with random weights, the library fits two tokens on
it, and the factors it made are counted: once as they are, and once with every side dense and no
input shared, as laplace-torch's `Kron` holds them. All layers of such a model have the same shapes,
so the model's figure is the layer's times the number of layers.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.harness.llama import ALL_PROJECTIONS, Workload, llama_with_lora
from laplace_lora import LogitsModel, LoraGGN

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Widths of a model and the adapter it carries; limits in GiB are for 64 eigenpairs."""

    hidden: int
    kv_width: int
    intermediate: int
    layers: int
    lora_rank: int
    targets: tuple[str, ...]
    limit: float


HEAD_WIDTH = 128
SHAPES = {
    "llama-2-7b": Shape(4096, 4096, 11008, 32, 8, ("q_proj", "v_proj"), 0.3),
    "llama-3-8b": Shape(4096, 1024, 14336, 32, 16, ALL_PROJECTIONS, 1.5),
}


def one_layer(shape: Shape) -> Workload:
    """Build one layer of a model and a batch of a single example of two tokens."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.hidden // HEAD_WIDTH,
        num_key_value_heads=shape.kv_width // HEAD_WIDTH,
        vocab_size=8,
    )
    peft_model = llama_with_lora(
        config, shape.lora_rank, list(shape.targets), torch.bfloat16, device="cpu"
    )
    batch = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2)}
    model = LogitsModel(peft_model, target_ids=[0, 1]).eval()
    return Workload(model, batch, torch.tensor([1]), classes=2)


def dense_bytes(work: Workload) -> int:
    """Count float32 factors with every side of every adapter map dense."""
    widths = [p.shape for p in work.model.parameters() if p.requires_grad]
    return sum(4 * side**2 for shape in widths for side in shape)


def count_bytes(name: str, factor_rank: int) -> dict[str, Any]:
    """Fit one layer and count what the library holds for all layers.

    Args:
        name: Key of `SHAPES`.
        factor_rank: Eigenpairs of a low-rank side.

    Returns:
        GiB of the sums while fitting, of the eigendecompositions that predictions use, of both
        (a fitted posterior keeps the sums so that data can be added), and of dense factors.
    """
    shape = SHAPES[name]
    work = one_layer(shape)
    backend = LoraGGN(work.model, "classification", factor_rank=factor_rank)
    _, kron = backend.kron(work.batch, work.labels, N=1)
    sums = kron.nbytes
    decomposed = kron.decompose()
    sides = {id(side): side for block in decomposed.blocks for side in block}.values()
    eigen = sum(s.vectors.nbytes + s.values.nbytes + s.residual.nbytes for s in sides)
    figures = {"sums": sums, "eigenpairs": eigen, "both": sums + eigen, "dense": dense_bytes(work)}
    return {key: shape.layers * count / GIB for key, count in figures.items()}


def factor_memory_rows(
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Return the table over ``args.shapes`` and its raw figures in GiB."""
    rows, raw = [], {}
    for name in args.shapes:
        shape, figures = SHAPES[name], count_bytes(name, args.factor_rank)
        raw[name] = figures
        row: dict[str, Any] = {
            "shape": name,
            "adapter": f"r={shape.lora_rank}, {len(shape.targets)} projections",
            "k": args.factor_rank,
        }
        row |= {f"{key} GiB": f"{value:.3f}" for key, value in figures.items()}
        for key in ("sums", "both"):
            met = f"{shape.limit}: " + ("pass" if figures[key] < shape.limit else "miss")
            row[f"{key} under"] = met if args.factor_rank == 64 else "-"
        rows.append(row)
    return rows, raw
