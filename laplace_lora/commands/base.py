"""What all commands share: options with several values, and errors that people read."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

INTERRUPTED = 130
VARIABLE = "LAPLACE_LORA_PROGRESS"  # as in data.loaders, which imports torch


class Values(click.Option):
    """An option that takes all values up to the next option: ``--target " yes" " no"``."""

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(names, **{"metavar": "TEXT ...", **kwargs, "multiple": True})


class Command(click.Command):
    """A command whose errors are one line, unless ``--debug`` asks for the traceback.

    Paragraphs of its help that have indented lines are kept as they are written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = as_written(self.help or "")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments, each further value of an option as if the option stood before it."""
        names = {name for p in self.params if isinstance(p, Values) for name in p.opts}
        return super().parse_args(ctx, spread(args, names))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            click.ClickException: In place of any error, unless ``--debug`` is given.
        """
        debug = bool(ctx.params.get("debug"))
        try:
            with _quiet_libraries(debug), _progress(not ctx.params.get("quiet")):
                return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except BrokenPipeError:  # whoever reads the results has seen enough; click ends quietly
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if debug:
                raise
            takes = any(p.name == "uncovered" for p in self.params)
            way = "--uncovered diag" if takes else "`laplace-lora fit --uncovered diag`"
            text = described(error).replace("uncovered='diag'", way)
            raise click.ClickException(text) from error


def point_out(text: str) -> None:
    """Write a warning to standard error."""
    click.echo(f"Warning: {text}", err=True)


def note(text: str | None) -> None:
    """Write what a user may want to know to standard error, unless there is ``--quiet``."""
    if text is not None and not click.get_current_context().params.get("quiet"):
        click.echo(text, err=True)


def as_written(text: str) -> str:
    """Return a help text in which click leaves paragraphs with indented lines as they are."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if "\n  " in p else p for p in paragraphs)


def described(error: Exception) -> str:
    """Return what to print of an error: its message, and its kind where that says more."""
    text = str(error).strip()
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or "out of memory" in text:
        return (
            f"{text.splitlines()[0]}\nTake a smaller --batch-size; `laplace-lora doctor ADAPTER "
            "--data FILE` says beforehand how much memory a fit takes."
        )
    if isinstance(error, KeyError) or not text:
        text = f"{kind}: {text}" if text else kind
    elif not isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
        text = f"{text} ({kind}; --debug shows where)"
    return text


def spread(args: Sequence[str], names: set[str]) -> list[str]:
    """Return a command line with an option of ``names`` before each of its values."""
    spread: list[str] = []
    option, has_value = None, False
    for i, word in enumerate(args):
        if word == "--":
            return [*spread, *args[i:]]
        if word.startswith("-") and word != "-" and not _is_number(word):
            option, has_value = (word if word in names else None), False
        elif option is not None:
            if has_value:
                spread.append(option)
            has_value = True
        spread.append(word)
    return spread


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@contextmanager
def _progress(shown: bool) -> Iterator[None]:
    """Switch progress bars off, unless they are to be shown."""
    before = os.environ.get(VARIABLE)
    if not shown:
        os.environ[VARIABLE] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


@contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Show this package's warnings as single lines, and those of other libraries only on demand."""
    if debug:
        yield
        return

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        point_out(str(message))

    level = logging.getLogger("bitsandbytes").level
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = show
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("bitsandbytes").setLevel(level)
