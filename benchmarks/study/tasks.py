"""Tasks of the studies on real data: rows, their splits and batches.

Classification of texts by an encoder, or by the answer tokens of a decoder (``--decoder``);
multiple choice by a decoder. See `checkpoints` for the models.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from examples import support

LETTERS = "ABCD"
CLASSIFICATION = {
    # name: files of training, test and shifted data, and of out-of-distribution inputs
    "sst2": ("train.jsonl.gz", "test.jsonl", "ood_cr.jsonl", None),
    "cola": ("train.jsonl", "dev.jsonl", "dev_ood.jsonl", None),
    "rte": ("train.jsonl", "dev.jsonl", "ood_qnli.jsonl.gz", None),
    "trec6": ("train.jsonl", "test.jsonl", None, "sst2/test.jsonl"),
}
CHOICE = {
    "arc_easy": ("train.jsonl", "test.jsonl", "arc_challenge/test.jsonl"),
    "arc_challenge": ("train.jsonl", "test.jsonl", "arc_easy/test.jsonl"),
}
TASKS = (*CLASSIFICATION, *CHOICE)
ANSWERS = {
    # name: how a decoder is asked, and what it may answer, in the order of the labels
    "sst2": ("Review: {text}\nSentiment:", ("negative", "positive")),
    "cola": ("Sentence: {text}\nIs this grammatical?", ("no", "yes")),
    "rte": ("{text}\nDoes it follow that: {text_pair}\nAnswer:", ("yes", "no")),
    "trec6": (
        "Question: {text}\nAsks for:",
        ("abbreviation", "description", "entity", "person", "place", "number"),
    ),
}


@dataclass(frozen=True)
class Task:
    """A data set, cut to size and tokenised.

    Attributes:
        name: What its files are named after: its folder's name, behind "decoder-" where a decoder
            classifies.
        model: Pretrained model, a folder or a name, or `support.DECODER`.
        classes: Number of classes or of choices.
        tokenizer: The model's.
        collate: From rows to a batch.
        splits: Tokenised rows of ``train``, ``val`` and ``test``; ``shifted`` where there is data
            of the same labels from elsewhere, ``ood`` where there are out-of-distribution inputs.
        target_ids: Answer tokens of a decoder, ``None`` for a classifier.
    """

    name: str
    model: str
    classes: int
    tokenizer: Any
    collate: Callable[[list[dict]], Any]
    splits: dict[str, list[dict]] = field(repr=False)
    target_ids: list[int] | None = None

    @property
    def evaluated(self) -> list[str]:
        """The splits that methods are evaluated on, the test set first."""
        return [split for split in ("test", "shifted", "ood") if split in self.splits]

    def loader(self, split: str, batch_size: int) -> DataLoader:
        """Return batches of a split in its own order."""
        return DataLoader(self.splits[split], batch_size, collate_fn=self.collate)


def add_task_arguments(parser: argparse.ArgumentParser, tasks: Sequence[str]) -> None:
    """Add the arguments that choose data and their size."""
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' folders")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(tasks))
    parser.add_argument("--model", help="pretrained model; the quickstart's encoder if left out")
    decoder = "classify by answer tokens, with SmolLM2-135M-Instruct unless --model names another"
    parser.add_argument("--decoder", action="store_true", help=decoder)
    parser.add_argument("--train-size", type=int, default=1000, help="rows to train on")
    parser.add_argument("--val-size", type=int, default=500, help="rows held out of the training")
    parser.add_argument("--test-size", type=int, default=1000, help="most rows to evaluate on")
    parser.add_argument("--shifted-size", type=int, default=500, help="most shifted rows")
    parser.add_argument("--max-tokens", type=int, default=128, help="longer texts are cut")


def settings_of(args: argparse.Namespace, splits: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the rows of some splits, and the model, depend on."""
    sizes = {f"{split}_size": getattr(args, f"{split}_size") for split in splits}
    model = args.model and Path(args.model).name
    return sizes | {"max_tokens": args.max_tokens, "model": model, "decoder": args.decoder}


def label_of(args: argparse.Namespace, name: str) -> str:
    """Return what the files of a task are named after."""
    return f"decoder-{name}" if args.decoder and name in CLASSIFICATION else name


def load_task(args: argparse.Namespace, name: str) -> Task:
    """Read, split and tokenise a task; the splits are the same for every seed of the training.

    Args:
        args: What `add_task_arguments` added.
        name: One of `TASKS`.

    Raises:
        SystemExit: If files are missing, or a decoder was not given.
    """
    folder = args.data / name
    if not folder.is_dir():
        raise SystemExit(f"--data: there is no folder {folder}")
    if name in CHOICE or args.decoder:
        return _answer_task(args, name, folder)
    return _classification_task(args, name, folder)


def _classification_task(args: argparse.Namespace, name: str, folder: Path) -> Task:
    model = args.model or support.encoder_path()
    parts, classes = _texts(args, name, folder)
    _, tokenizer = support.load_base(model, classes)
    encoded = {
        split: _ordered(split, support.encode(part, tokenizer, args.max_tokens))
        for split, part in parts.items()
    }
    return Task(
        label_of(args, name), model, classes, tokenizer, DataCollatorWithPadding(tokenizer), encoded
    )


def _answer_task(args: argparse.Namespace, name: str, folder: Path) -> Task:
    if not (args.model or args.decoder):
        raise SystemExit(f"{name} is answered by a decoder: give one with --model, or --decoder")
    model = args.model or support.DECODER
    tokenizer = decoder_tokenizer(model)
    if name in CHOICE:
        parts, answers = _questions(args, name, folder), tuple(LETTERS)
    else:
        parts, _ = _texts(args, name, folder)
        answers = ANSWERS[name][1]

    def encode(row: dict) -> dict:
        # Cut on the left: the answer follows the last token.
        ids = tokenizer(prompt(name, row))["input_ids"][-args.max_tokens :]
        label = row["answer"] if name in CHOICE else row["label"]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}

    encoded = {
        split: _ordered(split, [encode(row) for row in part]) for split, part in parts.items()
    }
    # Words of several tokens are told apart by the first; a letter may come behind a lone space.
    place = -1 if name in CHOICE else 0
    words = [tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for answer in answers]
    ids = [word[place] for word in words]
    if len(set(ids)) < len(ids):
        raise SystemExit(f"--model: the tokenizer does not tell the answers {answers} apart")
    collate = DataCollatorWithPadding(tokenizer)
    return Task(label_of(args, name), model, len(ids), tokenizer, collate, encoded, ids)


def decoder_tokenizer(model: str) -> Any:
    """Return a decoder's tokenizer, with a padding token."""
    if model == support.DECODER:
        return support.load_decoder()[1]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _texts(args: argparse.Namespace, name: str, folder: Path) -> tuple[dict[str, list[dict]], int]:
    """Return a classification task's rows by split, and the number of classes."""
    train_file, test_file, shifted_file, ood_file = CLASSIFICATION[name]
    rows, names = support.read_rows(folder / train_file)
    splits = _held_out(rows, args)
    splits["test"] = _cut(support.read_rows(folder / test_file)[0], args.test_size)
    if shifted_file:
        splits["shifted"] = _cut(support.read_rows(folder / shifted_file)[0], args.shifted_size)
    if ood_file:
        splits["ood"] = _cut(support.read_rows(args.data / ood_file)[0], args.shifted_size)
    return splits, len(names)


def _questions(args: argparse.Namespace, name: str, folder: Path) -> dict[str, list[dict]]:
    """Return a multiple-choice task's rows by split."""
    train_file, test_file, shifted_file = CHOICE[name]
    splits = _held_out(read_questions(folder / train_file), args)
    splits["test"] = _cut(read_questions(folder / test_file), args.test_size)
    if (args.data / shifted_file).exists():
        shifted = read_questions(args.data / shifted_file)
        splits["shifted"] = _cut(shifted, args.shifted_size)
    return splits


def read_questions(path: Path) -> list[dict]:
    """Read the questions of a file that have four choices, as nearly all have."""
    return [row for _, row in support.json_lines(path) if len(row["choices"]) == len(LETTERS)]


def prompt(name: str, row: dict) -> str:
    """Return a task's row as a decoder is asked it; the answer is the next token."""
    if name not in CHOICE:
        return ANSWERS[name][0].format(**row)
    choices = "\n".join(f"{a}. {c}" for a, c in zip(LETTERS, row["choices"], strict=True))
    return f"Question: {row['question']}\n{choices}\nAnswer:"


def _held_out(rows: list[dict], args: argparse.Namespace) -> dict[str, list[dict]]:
    rows = _cut(rows, len(rows))
    size = min(args.train_size, len(rows) - args.val_size)
    if size < 1:
        raise SystemExit(f"--val-size {args.val_size} leaves nothing of {len(rows)} rows to train")
    return {"val": rows[: args.val_size], "train": rows[args.val_size : args.val_size + size]}


def _cut(rows: list[dict], size: int) -> list[dict]:
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows[:size]


def _ordered(split: str, rows: list[dict]) -> list[dict]:
    """Order rows by length, so that batches hold little padding.

    Validation rows stay as they were drawn: the first fifty must be like the others.
    """
    return rows if split == "val" else sorted(rows, key=lambda row: len(row["input_ids"]))
