"""``laplace-lora`` as a program: help, exit codes, and what it imports."""

import errno
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import click
import pytest

from laplace_lora import __version__
from laplace_lora.commands import base, options
from laplace_lora.commands.entry import main
from laplace_lora.data import loaders
from laplace_lora.evaluation import evaluate
from laplace_lora.generation import decoding, scoring
from support.command_line import refused, run

SLOW = ("torch", "transformers", "peft", "laplace", "rich", "datasets")


def test_defaults_that_the_help_names_are_the_library_s():
    assert options.SCORED == scoring.SAMPLES and options.WRITTEN == decoding.SAMPLES
    coverage = inspect.signature(evaluate).parameters["coverage"].default
    assert f"hold the label. [default: {coverage}]" in " ".join(
        run("evaluate", "--help").stdout.split()
    )
    assert f"[default: {scoring.SAMPLES}]" in run("score", "--help").stdout
    assert f"[default: {decoding.SAMPLES}]" in run("generate", "--help").stdout


def test_no_summary_is_cut():
    lines = run("--help").stdout.partition("Commands:")[2].strip().splitlines()
    assert len(lines) == len(main.commands) and not any("..." in line for line in lines)


def test_a_reader_that_has_seen_enough_ends_it_quietly(monkeypatch):
    monkeypatch.setitem(main.commands, "stop", raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert "Broken pipe" not in run("stop", status=1).stderr


def program(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "laplace_lora", *map(str, args)],
        capture_output=True,
        text=True,
        **kwargs,
    )


def test_the_entry_point_is_this_group():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (name,) = re.findall(r'^laplace-lora = "(.*)"$', text, flags=re.M)
    assert resolve_name(name) is main


@pytest.mark.slow
def test_a_fit_as_a_program(adapter, data):
    folder = adapter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    fitted = program("fit", folder, "--data", data("train"), "-q", env=environment)
    assert fitted.returncode == 0 and fitted.stderr == "", fitted.stderr
    assert "Saved in" in fitted.stdout
    assert program("fit", folder).returncode == 2


@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"], ["--version"]])
def test_help_waits_for_no_large_library(args):
    code = (
        "import sys; from laplace_lora.commands.entry import main\n"
        f"main({args!r}, standalone_mode=False)\n"
        f"assert not set({SLOW}) & set(sys.modules), set({SLOW}) & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_teaches_by_examples(name):
    text = run(name, "--help").stdout
    assert f"  laplace-lora {name} my-adapter" in text  # kept on a line of its own
    assert "--debug" in text


def test_version():
    assert run("--version").stdout == f"laplace-lora, version {__version__}\n"


def test_wrong_arguments_have_status_two():
    assert "Missing option '--data'" in refused("predict", "x", status=2)
    assert "No such option" in refused("predict", "x", "--dat", "y", status=2)
    assert "is not one of" in refused("fit", "x", "--data", "y", "--structure", "q", status=2)
    assert "No such command" in refused("guess", status=2)


def test_debug_shows_the_traceback(tmp_path):
    result = run("info", tmp_path, "--debug", status=1)
    assert isinstance(result.exception, FileNotFoundError)
    assert isinstance(run("info", tmp_path, status=1).exception, SystemExit)


def raising(error):
    @click.command(cls=base.Command)
    def command():
        raise error

    return command


def test_an_interrupt_has_status_130(monkeypatch):
    monkeypatch.setitem(main.commands, "stop", raising(KeyboardInterrupt()))
    assert "Interrupted" in run("stop", status=130).stderr


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("row 3 is bad"), "Error: row 3 is bad"),
        (RuntimeError("odd"), "Error: odd (RuntimeError; --debug shows where)"),
        (KeyError("name"), "Error: KeyError: 'name'"),
        (AssertionError(), "Error: AssertionError"),
        (RuntimeError("CUDA out of memory. Tried"), "Take a smaller --batch-size"),
    ],
)
def test_errors_are_one_line(monkeypatch, error, text):
    monkeypatch.setitem(main.commands, "break", raising(error))
    assert text in refused("break")


def test_negative_numbers_are_values():
    words = ["fit", "--labels", "-1", "0", "-2.5", "--seed", "1"]
    wanted = ["fit", "--labels", "-1", "--labels", "0", "--labels", "-2.5", "--seed", "1"]
    assert base.spread(words, {"--labels"}) == wanted


def test_standard_output_is_utf_8_whatever_the_console_has():
    code = (
        "from laplace_lora.commands.output import json_lines\n"
        "with json_lines('-') as write: write({'text': 'é🙂'})"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    written = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert written.stdout.decode("utf-8").strip() == '{"text": "é🙂"}', written.stderr


def test_several_values_end_at_the_next_option():
    names = {"--target", "--labels"}
    words = ["x", "--target", " yes", " no", "-q", "y", "--labels", "a", "b", "--", "c"]
    expected = ["x", "--target", " yes", "--target", " no", "-q", "y"]
    expected += ["--labels", "a", "--labels", "b", "--", "c"]
    assert base.spread(words, names) == expected
    assert base.spread(["--target=-1", "--target", "-"], names) == ["--target=-1", "--target", "-"]


def test_quiet_switches_progress_off_and_on_again(monkeypatch):
    assert base.VARIABLE == loaders.VARIABLE
    monkeypatch.setattr(loaders, "DELAY", 0.0)

    @click.command(cls=base.Command)
    @click.option("--quiet", is_flag=True)
    def count(quiet):
        list(loaders.progress([1, 2], None, "Counting"))

    monkeypatch.setitem(main.commands, "count", count)
    assert run("count", "--quiet").stderr == ""
    assert "Counting" in run("count").stderr
    monkeypatch.setenv(base.VARIABLE, "1")
    run("count", "--quiet")
    assert os.environ[base.VARIABLE] == "1"
