"""Tables: what is shown, escaped and left out."""

import sys

import pytest
import torch

from laplace_lora.display.tables import data_frame, html_table, plain, spread


def test_a_table_escapes_and_limits_its_rows():
    table = html_table({"a<b": ["<i>", "y", "z"], "n": [0.123456, 2.0, True]}, "all & more", 2)
    assert "<th>a&lt;b</th>" in table and "<td>&lt;i&gt;</td><td>0.1235</td>" in table
    assert "<caption>all &amp; more (the first 2 of 3)</caption>" in table
    assert "<td>z</td>" not in table and table.count("<tr>") == 3
    assert "<caption>" not in html_table({"a": [1]})


def test_columns_must_be_of_one_length():
    with pytest.raises(ValueError):
        html_table({"a": [1], "b": [1, 2]})


def test_plain_values_have_no_tensors():
    nested = {"a": torch.tensor([[1.0, 2.0]]), "b": (torch.tensor(3), [None, "x"])}
    assert plain(nested) == {"a": [[1.0, 2.0]], "b": [3, [None, "x"]]}


def test_a_matrix_becomes_columns():
    assert spread("p", torch.tensor([[1, 2], [3, 4]])) == {"p_0": [1, 3], "p_1": [2, 4]}


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        data_frame({"a": [1]})
