"""Selective prediction: answer only when the error rate will stay below what you can accept.

A confidence threshold is chosen on validation data so that the answered share has at most a chosen
risk; test data show whether it holds, for the fine-tuned model (MAP), for temperature scaling with
further labelled rows, and for the Laplace posterior, which needs none of them. The default needs
nothing but the installation: the quickstart's encoder and its sentences about tumours. Or bring
your own::

    python examples/abstain.py --model path/to/model --data reviews.jsonl --risk 0.05

with one JSON object per line, ``{"text": "...", "text_pair": null, "label": 0}``.

The threshold is chosen on some hundred rows, so the risk on test data differs from the one that was
asked for by about its standard error, which is printed. Where MAP is overconfident its confidences
crowd near 1; compare the mean confidence of what was answered with its accuracy. Methods that put
the rows into the same order answer the same share; of two classes, temperature scaling never
changes the MAP's order.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import support
import torch
from torch import Tensor
from transformers import set_seed

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import (
    MAP,
    CalibrationReport,
    TemperatureScaling,
    compare,
    evaluate,
    plot_reports,
)
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
    # A threshold answers all rows of one confidence, or none of them.
    last_of_level = torch.cat([confidence[1:] < confidence[:-1], torch.tensor([True])])
    good = ((risks <= risk) & last_of_level).nonzero().flatten()
    return confidence[good[-1]].item() if len(good) else 2.0


def answered(report: CalibrationReport, threshold: float) -> dict[str, float]:
    """Return coverage, risk with its standard error, and mean confidence above a threshold."""
    confidence, guess = report.probs.max(-1)
    chosen = confidence >= threshold
    n = int(chosen.sum())
    risk = (guess != report.labels)[chosen].double().mean().item() if n else float("nan")
    return {
        "coverage": n / len(chosen),
        "risk": risk,
        "error": (risk * (1 - risk) / n) ** 0.5 if n > 1 else float("nan"),
        "confidence": confidence[chosen].mean().item() if n else float("nan"),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line and the rows."""
    parser = support.argument_parser(__doc__, *support.COMMON)
    parser.add_argument("--risk", type=float, default=0.05, help="accepted share of wrong answers")
    parser.add_argument("--picture", type=Path, help="where to draw the test calibration, a .png")
    args = parser.parse_args()
    if not 0 < args.risk < 1:
        parser.error(f"--risk must lie between 0 and 1, got {args.risk}")
    args.train_rows, args.held_out, args.names = support.read_split(parser, args, least_held_out=20)
    return args


def main() -> None:
    args = parse_arguments()
    scaling_rows, held_out = support.share_out(args.held_out)
    half = len(held_out) // 2

    # 1. Fine-tune as usual.
    set_seed(args.seed)
    model, tokenizer = support.load_model(args.model, len(args.names), args.device)
    train_loader = support.make_loader(args.train_rows, tokenizer, shuffle=True)
    val_loader, test_loader = (
        support.make_loader(rows, tokenizer, 4 * support.BATCH_SIZE)
        for rows in (held_out[:half], held_out[half:])
    )
    support.train(model, train_loader, args.epochs)

    # 2. Fit and tune a posterior around the trained adapter, all on the training data.
    la = KronLoraLaplace(model, "classification")
    la.fit(train_loader, progress_bar=True)
    la.optimize_prior_precision()

    # 3. Choose each method's threshold on validation data, and try it on test data. Temperature
    # scaling corrects the MAP with labelled rows that the posterior does without.
    scaled = TemperatureScaling(model, support.make_loader(scaling_rows, tokenizer))
    methods = {"MAP": MAP(model), "temperature scaling": scaled, "Laplace": la}
    print(
        f"\nAt most {args.risk:.0%} of the answers may be wrong; the threshold is chosen on "
        f"{len(val_loader.dataset)} rows and tested on {len(test_loader.dataset)} others. "
        f"The temperature ({scaled.temperature:.2f}) is found on {len(scaling_rows)} more."
    )
    rows, tests = [], []
    for name, method in methods.items():
        validation = evaluate(method, val_loader, name=name)
        tests.append(evaluate(method, test_loader, name=name))
        threshold = choose_threshold(validation.probs, validation.labels, args.risk)
        result = answered(tests[-1], threshold)
        row = {"answered": name, "threshold": f"{threshold:.4f}"}
        row["coverage"] = f"{result['coverage']:.1%}"
        row["risk on test"] = f"{result['risk']:.3f}"
        if not math.isnan(result["error"]):
            row["risk on test"] += f" ± {result['error']:.3f}"
        row["confidence"] = f"{result['confidence']:.3f}"
        rows.append(row | {"accuracy": f"{1 - result['risk']:.3f}"})
    print(support.table(rows))
    print("\nAll test rows answered:\n" + compare(tests, ["accuracy", "NLL", "ECE", "AURC"]))
    if args.picture:
        plot_reports(tests).savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
