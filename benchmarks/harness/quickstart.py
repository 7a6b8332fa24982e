"""The quickstart's model, fine-tuned on its data or on other rows."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from examples import support
from laplace_lora import LogitsModel


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose model, data and training."""
    parser.add_argument("--model", help="folder or name; default: the quickstart's encoder")
    parser.add_argument("--data", type=Path, help="rows as the quickstart reads them")
    parser.add_argument("--train-size", type=int, default=200)
    parser.add_argument("--test-size", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=15)


def fine_tuned(args: argparse.Namespace, seed: int) -> tuple[LogitsModel, DataLoader, DataLoader]:
    """Fine-tune the quickstart's model.

    Returns:
        The model, and the loaders of training and test data.
    """
    rows, names = support.tumour_rows() if args.data is None else support.read_rows(args.data)
    random.Random(seed).shuffle(rows)
    torch.manual_seed(seed)
    name = args.model or support.encoder_path()
    model, tokenizer = support.load_model(name, len(names), args.device)
    collate = DataCollatorWithPadding(tokenizer)
    data = support.encode(rows[: args.train_size + args.test_size], tokenizer)
    train_data, test_data = data[: args.train_size], data[args.train_size :]
    loader = DataLoader(train_data, args.batch, shuffle=True, collate_fn=collate)
    support.train(model, loader, args.epochs)
    model = LogitsModel(model.to(getattr(torch, args.dtype)))
    return model, loader, DataLoader(test_data, args.batch, collate_fn=collate)
