"""``laplace-lora info``."""

from __future__ import annotations

import click

from laplace_lora.commands.base import Command


@click.command(cls=Command, short_help="Say what a saved posterior is.")
@click.argument("posterior")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def info(posterior: str, as_json: bool, debug: bool) -> None:
    """Say what a saved posterior is: what it covers, its prior, its sizes and its fingerprints.

    POSTERIOR is the folder or the repository where it lies, usually that of its adapter. The model
    is not loaded; the files are checked against their hashes.

    Examples:
      laplace-lora info my-adapter
      laplace-lora info my-adapter --json
    """
    from laplace_lora.commands.description import run

    run(posterior, as_json)
