"""Rows are read from every kind of data, and bad lines are named."""

import csv
import gzip
import io
import sys

import pytest

from laplace_lora.commands.reading.rows import read_rows
from support.command_line import refused
from support.on_disk import write_json_lines, write_table

ROWS = [{"text": "a, b", "label": "1"}, {"text": 'the "film"\nwas', "label": "0"}]


def test_json_lines_skip_empty_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "ü", "label": 1}\n\n{"text": "b"}\n', encoding="utf-8")
    assert read_rows(str(path)) == [{"text": "ü", "label": 1}, {"text": "b"}]


def test_standard_input_is_read_as_files_are(monkeypatch):
    """In UTF-8 with or without a byte order mark, whatever the terminal's encoding."""
    content = '\ufeff{"text": "ü"}\r\n'.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    assert read_rows("-") == [{"text": "ü"}]
    assert not sys.stdin.buffer.closed


def test_columns_without_a_name_may_be_several(tmp_path):
    (tmp_path / "x.csv").write_text("text,,\na,,\n")  # as spreadsheets leave them
    assert read_rows(str(tmp_path / "x.csv")) == [{"text": "a", "": ""}]


def test_json_lines_may_be_compressed(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"text": "a"}\n')
    assert read_rows(str(path)) == [{"text": "a"}]


def test_tables_keep_quoted_commas_and_lines(tmp_path):
    path = write_table(tmp_path / "x.csv", ROWS)
    assert read_rows(str(path)) == ROWS
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    assert read_rows(str(path)) == ROWS
    (tmp_path / "x.tsv").write_text("text\tlabel\na, b\t1\n")
    assert read_rows(str(tmp_path / "x.tsv")) == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"text": 1}\n{oops\n', "line 2: expected a JSON object, .* got {oops"),
        ("x.jsonl", '{"text": 1, "text": 2}\n', "line 1: 'text' is named twice"),
        ("x.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("x.jsonl", "42\n", 'line 1: expected a JSON object, such as {"text": "..."}, got 42'),
        ("x.jsonl", "\n", "has no rows"),
        ("x.jsonl", "text,label\n", "line 1: expected a JSON object, .* got text,label"),
        ("x.csv", "text,label\na,b,c\n", "line 2: expected 2 columns"),
        ("x.csv", "text,label\na\n", "line 2: expected 2 columns"),
        ("x.csv", 'text,label\n"a\nb\n', "line 3, of a row that begins in 2: unexpected end of"),
        ("x.csv", 'text,label\na,1\n"a" b,1\n', "line 3: .* or save the data as JSON lines"),
        ("x.csv", "text;label\na, b;1\n", "columns are separated by semicolons. Save it with com"),
        ("x.csv", "text\tlabel\na, b\t1\n", "columns are separated by tabs. Save it with commas"),
        ("x.tsv", 'text\tlabel\n"a\t1\nb\n', "line 3: expected 2 columns"),
        ("x.csv", "text,label,label\na,0,1\n", "has 2 columns 'label'"),
        ("x.parquet", "", "expected a file in .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(str(path))


@pytest.mark.parametrize("name", ["x.TSV", "x.CSV", "x.JSONL"])
def test_suffixes_may_be_in_capitals(tmp_path, name):
    row = '{"text": "a", "label": "1"}\n'
    content = {"x.TSV": "text\tlabel\na\t1\n", "x.CSV": "text,label\na,1\n", "x.JSONL": row}
    (tmp_path / name).write_text(content[name])
    assert read_rows(str(tmp_path / name)) == [{"text": "a", "label": "1"}]


@pytest.mark.parametrize(
    "texts",
    [
        ['"a', "b", 'c"', "d"],
        ['"a" b', "c"],
        ['""a"" b', "c"],
        ['"a', "b"],
        ['a "b"', 'c "'],
    ],
)
def test_quotation_marks_of_a_table_with_tabs_may_be_plain(tmp_path, texts):
    """As in the files of GLUE, in which one at the beginning of a text runs no rows together."""
    path = tmp_path / "x.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(texts)))
    expected = [{"text": text, "label": str(i)} for i, text in enumerate(texts)]
    assert read_rows(str(path)) == expected


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("texts", [['"a" b', "c"], ["a\nb", "c"], ["a\tb", '"c"'], ["a", "b"]])
def test_quotation_marks_of_a_table_with_tabs_may_surround_cells(tmp_path, texts, quoting):
    rows = [{"text": text, "label": str(i)} for i, text in enumerate(texts)]
    with (tmp_path / "x.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    assert read_rows(str(tmp_path / "x.tsv")) == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_line_breaks_run_no_rows_of_a_single_column_together(tmp_path, quoting):
    rows = [{"text": "first\nsecond"}, {"text": "a plain one"}, {"text": 'said "no"\r\nand left'}]
    with (tmp_path / "x.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text"], delimiter="\t", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    assert read_rows(str(tmp_path / "x.tsv")) == rows


SPANNING = '"I went on a whim.{0}The room was cold.{0}I shall not go back."'


@pytest.mark.parametrize(
    "text",
    [
        f"text\nfine\n{SPANNING}\ngood\n",
        f'text\nfine\n{SPANNING}\na ""fine"" one\n',
        f"text\r\nfine\r\n{SPANNING}\r\n",
    ],
)
def test_rows_of_a_single_column_that_may_be_one_are_refused(tmp_path, text):
    path = tmp_path / "x.tsv"
    text = text.format("\r\n" if "\r" in text else "\n")
    path.write_text(text, newline="")
    with pytest.raises(
        ValueError, match=r"x\.tsv, line 3: a quotation mark .* as \.jsonl or \.csv"
    ):
        read_rows(str(path))


@pytest.mark.parametrize(
    "text",
    [
        f'"text"\n"fine"\n{SPANNING}\n',  # as all cells
        f'text\n{SPANNING}\n"a ""fine"" one"\n',
        f'text\n{SPANNING}\n"a ""fine""\none"\n',
        f'text\n{SPANNING}\n""\n',  # as pandas writes what is empty
        f"text\r\n{SPANNING}\r\nfine\r\n",  # in which only rows end so
    ],
)
def test_texts_of_several_lines_in_a_single_column_stay_whole_where_it_is_clear(tmp_path, text):
    (tmp_path / "x.tsv").write_text(text.format("\n"), newline="")
    assert {"text": SPANNING.format("\n")[1:-1]} in read_rows(str(tmp_path / "x.tsv"))


def test_files_that_are_not_read_to_their_end_are_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("text\nschön\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.csv is not in UTF-8: .*0xf6; save it as UTF-8"):
        read_rows(str(path))
    content = gzip.compress(b'{"text": "a"}\n' * 99)
    for name, part in (("cut", content[:-9]), ("plain", b'{"text": "a"}\n')):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(part)
        with pytest.raises(ValueError, match=f"{name}.jsonl.gz is no whole gzip file"):
            read_rows(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rows(str(tmp_path / "gone.json"))
    assert "gone.jsonl" in refused("predict", "anything", "--data", tmp_path / "gone.jsonl")


def test_data_set_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    single, several = tmp_path / "single", tmp_path / "several"
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(single)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(several)
    assert read_rows(str(single)) == ROWS
    tensors = datasets.Dataset.from_list([{"text": "a", "label": 1}]).with_format("torch")
    tensors.save_to_disk(tmp_path / "tensors")
    assert read_rows(str(tmp_path / "tensors")) == [{"text": "a", "label": 1}]
    assert read_rows(str(several), "test") == ROWS[1:] == read_rows(f"{several}:test")
    with pytest.raises(ValueError, match="and no val"):
        read_rows(f"{several}:val")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rows(f"{tmp_path}/gone:val")
    with pytest.raises(ValueError, match="train, test; choose one"):
        read_rows(str(several))
    with pytest.raises(ValueError, match="train, test, and no val"):
        read_rows(str(several), "val")
    with pytest.raises(ValueError, match="has no splits"):
        read_rows(str(single), "val")
    with pytest.raises(ValueError, match="no data set folder"):
        read_rows("-", "val")


def test_files_as_on_the_hub_are_read_quietly_if_asked(tmp_path, monkeypatch, capfd):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("LAPLACE_LORA_PROGRESS", "0")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    for name, rows in (("train", ROWS), ("validation", ROWS[1:])):
        write_table(folder / f"{name}.csv", rows)
    found = read_rows(f"{folder}:validation")
    assert [str(value) for value in found[0].values()] == list(ROWS[1].values())
    assert "examples/s" not in capfd.readouterr().err
    assert not datasets.are_progress_bars_disabled()


def test_files_of_a_folder_are_all_read_or_refused_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    write_json_lines(folder / "a.jsonl", ROWS)
    write_table(folder / "b.csv", ROWS)
    with pytest.raises(
        ValueError, match=r"several kinds, a\.jsonl \(JSON\), b\.csv \(CSV\), of wh"
    ):
        read_rows(str(folder))
    (folder / "b.csv").unlink()
    write_json_lines(folder / "b.json", ROWS[:1])
    assert len(read_rows(str(folder))) == 3
    for name in ("train.jsonl", "train-1.jsonl"):  # beside which others are no part of a split
        write_json_lines(folder / name, ROWS[:1])
    write_table(folder / "results.csv", ROWS)
    assert len(read_rows(f"{folder}:train")) == 2
    write_table(folder / "test.csv", ROWS)
    with pytest.raises(ValueError, match=r"several kinds, .*test\.csv"):
        read_rows(f"{folder}:train")


def test_without_datasets_a_folder_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_rows(str(tmp_path))
