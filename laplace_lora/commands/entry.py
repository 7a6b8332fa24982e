"""``laplace-lora``, the group of all commands."""

from __future__ import annotations

import click

from laplace_lora.commands.base import as_written
from laplace_lora.commands.fit import doctor, fit, info
from laplace_lora.commands.generate import generate, score
from laplace_lora.commands.predict import evaluate, predict
from laplace_lora.version import __version__

HELP = """Calibrated uncertainty for LoRA adapters, from the command line.

An ADAPTER is what PEFT's save_pretrained wrote, a folder or a repository on the hub. `fit` puts a
posterior beside it, the other commands load both.

Examples:
  laplace-lora doctor my-adapter --data train.jsonl
  laplace-lora fit my-adapter --data train.jsonl --val val.jsonl
  laplace-lora predict my-adapter --data new.jsonl --out answers.jsonl
  laplace-lora evaluate my-adapter --data test.jsonl

Data are JSON lines, CSV files or data set folders; `laplace-lora fit --help` says which columns are
read. Progress and notes go to standard error, results to standard output or to a file. A command
that fails leaves no file behind and ends with status 1 (2: wrong arguments, 130: interrupted).
"""


@click.group(
    help=as_written(HELP),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="laplace-lora")
def main() -> None:
    """See `HELP`."""


for command in (fit, predict, evaluate, score, generate, info, doctor):
    main.add_command(command)
