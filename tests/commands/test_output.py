"""Results replace no file that is read."""

import io
import sys

import pytest

from laplace_lora.commands.output import check_writable


def test_results_do_not_replace_what_standard_input_comes_from(tmp_path, data, monkeypatch):
    """As behind ``<`` of a shell."""
    path, link = data("test"), tmp_path / "link.jsonl"
    link.symlink_to(path)
    with path.open() as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", file)
        for out in (path, link):
            with pytest.raises(ValueError, match=f"{out} belongs to the data -, which results wou"):
                check_writable(str(out), data=["-"])
        check_writable(str(data("val")), data=["-"])
    for given in (io.StringIO("{}"), None):  # without a descriptor
        monkeypatch.setattr(sys, "stdin", given)
        check_writable(str(path), data=["-"])
