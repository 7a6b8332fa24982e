"""Adapters on disk, made once, and fresh copies of them."""

import shutil

import pytest

from support.command_line import run
from support.on_disk import (
    reviews,
    save_classifier,
    save_decoder,
    save_reward_model,
    write_json_lines,
)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """From a kind to the folder of an adapter without a posterior, made once."""
    kinds = {
        "classifier": save_classifier,
        "one output": lambda folder: save_classifier(folder, outputs=1),
        "decoder": save_decoder,
        "chat": lambda folder: save_decoder(folder, chat=True),
        "reward": save_reward_model,
        "ended reward": lambda folder: save_reward_model(folder, end="[EOS]"),
    }
    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folders[kind] = kinds[kind](tmp_path_factory.mktemp(kind.replace(" ", "-")))
        return folders[kind]

    return folder_of


@pytest.fixture
def adapter(made, tmp_path):
    """From a kind to a copy of an adapter, which may be written to."""

    def copied(kind="classifier"):
        return shutil.copytree(made(kind), tmp_path / kind.replace(" ", "-"))

    return copied


@pytest.fixture
def posterior(adapter):
    """From a kind, a file and options to a copy of an adapter that was fitted on the file."""

    def fitted(kind, path, *options):
        folder = adapter(kind)
        run("fit", folder, "--data", path, *options, "-q")
        return folder

    return fitted


@pytest.fixture
def data(tmp_path):
    """From a name to a file of reviews."""
    seeds = {"train": (48, 0), "val": (32, 1), "test": (20, 2)}

    def file_of(name, change=lambda row: row):
        rows = [change(row) for row in reviews(*seeds[name])]
        return write_json_lines(tmp_path / f"{name}.jsonl", rows)

    return file_of
