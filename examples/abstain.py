"""Selective prediction: answer only when the error rate will stay below what you can accept.

A confidence threshold is chosen on validation data so that the answered share has at most a chosen
risk; test data show whether it holds, for the fine-tuned model (MAP) and for its Laplace posterior
side by side. The default needs nothing but the installation: the quickstart's encoder and its
sentences about tumours. Or bring your own::

    python examples/abstain.py --model path/to/model --data reviews.jsonl --risk 0.05

with one JSON object a line, ``{"text": "...", "text_pair": null, "label": 0}``.

What to look for: the threshold is chosen on some hundred rows, so the risk on test data strays from
the one that was asked for by about its standard error, which is printed. Where MAP is overconfident
its confidences crowd near 1; the posterior's are honest: compare the mean confidence of what was
answered with its accuracy. Where both put the rows into the same order, coverage is alike.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from peft import PeftModel
from quickstart import (
    BATCH_SIZE,
    encode,
    get_model_path,
    load_model,
    read_rows,
    train,
    tumour_rows,
)
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, set_seed

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import MAP, CalibrationReport, compare, evaluate
from laplace_lora.evaluation.metrics import risk_coverage


def choose_threshold(p: Tensor, labels: Tensor, risk: float) -> float:
    """Return the lowest confidence at which answers are right often enough on these data.

    Args:
        p: Class probabilities, ``(rows, classes)``.
        labels: ``(rows,)``.
        risk: Largest accepted error rate among the answers.

    Returns:
        A confidence; 2, which no answer reaches, if no threshold will do.
    """
    _, risks = risk_coverage(p, labels)
    confidence = p.max(-1).values.sort(descending=True).values
    # Answers of one confidence stand or fall together.
    last_of_level = torch.cat([confidence[1:] < confidence[:-1], torch.tensor([True])])
    good = ((risks <= risk) & last_of_level).nonzero().flatten()
    return confidence[good[-1]].item() if len(good) else 2.0


def answered(report: CalibrationReport, threshold: float) -> dict[str, float]:
    """Return coverage, risk and mean confidence above a threshold."""
    confidence, guess = report.probs.max(-1)
    kept = confidence >= threshold
    n = int(kept.sum())
    risk = (guess != report.labels)[kept].double().mean().item() if n else float("nan")
    return {
        "coverage": n / len(kept),
        "risk": risk,
        "error": (risk * (1 - risk) / n) ** 0.5 if n else float("nan"),
        "confidence": confidence[kept].mean().item() if n else float("nan"),
    }


def fine_tuned(args: argparse.Namespace, rows: list[dict], classes: int) -> tuple:
    """Fine-tune the model; return it with loaders of training, validation and test data."""
    set_seed(args.seed)
    model, tokenizer = load_model(args.model, classes, args.device)
    collate = DataCollatorWithPadding(tokenizer)
    data = encode(rows, tokenizer)
    held_out = (len(rows) - args.train_size) // 2
    parts = data[: args.train_size], data[args.train_size :][:held_out]
    parts = (*parts, data[args.train_size + held_out :])
    loaders = [
        DataLoader(part, size, shuffle=size == BATCH_SIZE, collate_fn=collate)
        for part, size in zip(parts, (BATCH_SIZE, 4 * BATCH_SIZE, 4 * BATCH_SIZE), strict=True)
    ]
    train(model, loaders[0], args.epochs)
    return model, *loaders


def posterior(model: PeftModel, train_loader: DataLoader) -> KronLoraLaplace:
    """Fit and tune a posterior around the trained adapter, all on the training data."""
    la = KronLoraLaplace(model, "classification")
    la.fit(train_loader, progress_bar=True)
    la.optimize_prior_precision()
    return la


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(get_model_path()), help="folder or name of a model")
    parser.add_argument("--data", type=Path, help="a .jsonl or .jsonl.gz file of yours")
    parser.add_argument("--risk", type=float, default=0.05, help="accepted share of wrong answers")
    parser.add_argument("--seed", type=int, default=0, help="of split, head and training")
    parser.add_argument("--train-size", type=int, default=100, help="rows to train on")
    parser.add_argument("--epochs", type=int, default=25, help="passes over these rows")
    parser.add_argument("--picture", type=Path, help="where to draw the test calibration, a .png")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to compute")
    args = parser.parse_args()
    if not 0 < args.risk < 1:
        parser.error(f"--risk must lie between 0 and 1, got {args.risk}")
    return args


def main() -> None:
    args = parse_arguments()
    rows, names = tumour_rows() if args.data is None else read_rows(args.data)
    if args.train_size > len(rows) - 20:
        raise SystemExit(f"--train-size leaves too few of {len(rows)} rows to choose and to test")
    random.Random(args.seed).shuffle(rows)
    model, train_loader, val_loader, test_loader = fine_tuned(args, rows, len(names))
    la = posterior(model, train_loader)
    methods = {"MAP": MAP(model), "Laplace": la}

    tests = []
    print(
        f"\nAt most {args.risk:.0%} of the answers may be wrong; the threshold is chosen on "
        f"{len(val_loader.dataset)} rows and tested on {len(test_loader.dataset)} others."
    )
    print(
        f"{'':<9}{'threshold':>10}{'coverage':>10}{'risk on test':>18}{'confidence':>12}"
        f"{'accuracy':>10}"
    )
    for name, method in methods.items():
        chosen = evaluate(method, val_loader, name=name)
        test = evaluate(method, test_loader, name=name)
        tests.append(test)
        threshold = choose_threshold(chosen.probs, chosen.labels, args.risk)
        found = answered(test, threshold)
        print(
            f"{name:<9}{threshold:>10.4f}{found['coverage']:>10.1%}"
            f"{found['risk']:>10.3f} ± {found['error']:.3f}{found['confidence']:>12.3f}"
            f"{1 - found['risk']:>10.3f}"
        )
    print("\nAll test rows answered:\n" + compare(tests, ["accuracy", "NLL", "ECE", "AURC"]))
    if args.picture:
        from laplace_lora.evaluation import plot_reports

        plot_reports(tests).savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
