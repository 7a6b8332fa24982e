"""Adaptive ranks: let a posterior decide which layers of an adapter deserve their rank.

AdaLoRA starts every layer with a few rank-one components and keeps the most important. Here its
optimiser is IVON, whose posterior gives each weight a variance, and importance is the signal-to-
noise ratio of a weight's magnitude. The same budget with AdamW and AdaLoRA's own sensitivity is the
comparison. Run it without arguments after ``pip install "laplace-lora[examples]"``; nothing is
downloaded, and two cores need about three minutes::

    python examples/adaptive_ranks.py

It prints the ranks kept per layer, draws them to ``adaptive_ranks.png``, and compares accuracy, NLL
and ECE on held-out data. ``--data FILE.jsonl`` takes your own, see the quickstart.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import support
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from laplace_lora.adaptive import IVON, AdaLoraCallback, remove_pruned_triplets
from laplace_lora.evaluation import MAP, compare, evaluate

MODULES = ["query", "key", "value", "attention.output.dense"]
INITIAL_RANK = 6
SAMPLES = 1e6  # effective sample size; with 100, noise would drown the steps
IVON_SETTINGS = {"lr": 5.0, "hess_init": 1e-3, "betas": (0.9, 0.98), "clip_radius": 1e-3}


def adalora_model(name: str, classes: int, target_rank: int, steps: int) -> PeftModel:
    """Load a pretrained model with an AdaLoRA adapter whose schedule fits the training."""
    base, _ = support.load_base(name, classes)
    config = AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=INITIAL_RANK,
        target_r=target_rank,
        lora_alpha=2 * INITIAL_RANK,
        target_modules=MODULES,
        total_step=steps,
        tinit=steps // 5,
        tfinal=steps // 4,
        deltaT=max(1, steps // 20),
        orth_reg_weight=0.1,
    )
    return get_peft_model(base, config)


def fine_tune(
    model: PeftModel, rows: list[dict], collate, steps: int, bayesian: bool, seed: int
) -> dict[str, int]:
    """Train with `Trainer`; return the rank that each layer keeps."""
    # PEFT's rank counts are no parameters.
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
    if bayesian:
        optimizer = IVON(trained, ess=SAMPLES, **IVON_SETTINGS)
        callback = AdaLoraCallback("snr_magnitude")
    else:
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        callback = AdaLoraCallback("sensitivity")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=support.BATCH_SIZE,
            max_steps=steps,
            max_grad_norm=0.0,  # clipping would bias IVON's curvature
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            seed=seed,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[callback],
            optimizers=(optimizer, None),
        )
        trainer.train()
    if bayesian:
        change = optimizer.curvature_change()
        print(f"IVON's curvatures moved to {change[1]:.2f}-{change[5]:.2f} of their start (90 %)")
    return remove_pruned_triplets(model)


def rank_table(ranks: dict[str, int]) -> np.ndarray:
    """Arrange ranks by module (rows) and layer (columns)."""
    layers = sorted({int(part) for name in ranks for part in name.split(".") if part.isdigit()})
    table = np.zeros((len(MODULES), len(layers)), dtype=int)
    for name, rank in ranks.items():
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        row = next(i for i, module in enumerate(MODULES) if name.endswith(module))
        table[row, layers.index(layer)] = rank
    return table


def print_ranks(method: str, table: np.ndarray) -> None:
    """Print a table of ranks by module and layer."""
    print(f"\nRanks kept by layer, {method}")
    columns = [str(layer) for layer in range(table.shape[1])]
    rows = [
        {"module": module, **dict(zip(columns, row.tolist(), strict=True))}
        for module, row in zip(MODULES, table, strict=True)
    ]
    print(support.table(rows))


def draw(tables: dict[str, np.ndarray], path: Path) -> None:
    """Draw one panel per method: darker cells kept more rank."""
    figure, axes = plt.subplots(
        1, len(tables), figsize=(5.2 * len(tables), 3.4), sharey=True, layout="constrained"
    )
    for axis, (method, table) in zip(np.atleast_1d(axes), tables.items(), strict=True):
        image = axis.imshow(table, cmap="Blues", vmin=0, vmax=INITIAL_RANK, aspect="auto")
        for (row, column), rank in np.ndenumerate(table):
            color = "white" if rank > 0.6 * INITIAL_RANK else "black"
            axis.text(column, row, str(rank), ha="center", va="center", color=color)
        axis.set_title(method)
        axis.set_xlabel("layer")
        axis.set_xticks(range(table.shape[1]))
        axis.set_yticks(range(len(MODULES)), MODULES)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="rank kept", ticks=range(INITIAL_RANK + 1))
    figure.savefig(path, dpi=150)
    print(f"\nDrawn to {path}")


def main() -> None:
    parser = support.argument_parser(__doc__, "model", "data", "seed", "train-size")
    parser.add_argument("--steps", type=support.count, default=260, help="training steps")
    parser.add_argument("--target-rank", type=int, default=2, help="average rank kept")
    parser.add_argument("--out", type=Path, default=Path("adaptive_ranks.png"), help="the picture")
    arguments = parser.parse_args()
    train_rows, test_rows, names = support.read_split(parser, arguments)
    _, tokenizer = support.load_base(arguments.model, len(names))
    test_loader = support.make_loader(test_rows[: support.MAX_TEST], tokenizer, 64)

    tables, reports = {}, []
    for method, bayesian in (("AdamW, sensitivity", False), ("IVON, SNR of magnitude", True)):
        print(f"\n{method}: {arguments.steps} steps")
        set_seed(arguments.seed)
        model = adalora_model(arguments.model, len(names), arguments.target_rank, arguments.steps)
        data, collate = support.encode(train_rows, tokenizer), DataCollatorWithPadding(tokenizer)
        ranks = fine_tune(model, data, collate, arguments.steps, bayesian, arguments.seed)
        tables[method] = rank_table(ranks)
        reports.append(evaluate(MAP(model), test_loader, name=method, progress_bar=True))
    for method, table in tables.items():
        print_ranks(method, table)
    draw(tables, arguments.out)
    print("\n" + compare(reports, support.SHOWN))


if __name__ == "__main__":
    main()
