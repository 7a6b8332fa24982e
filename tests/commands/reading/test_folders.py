"""Which files of a folder are its data."""

import shutil
import zipfile

import pytest

from laplace_lora.commands.output import check_writable
from laplace_lora.commands.reading.folders import files_of_folder
from laplace_lora.commands.reading.rows import read_named, read_rows
from support.on_disk import write_json_lines, write_table

datasets = pytest.importorskip("datasets")
ROWS = [{"text": "a, b", "label": 1}, {"text": "the film", "label": 0}]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = tmp_path / "hub"
    made.mkdir()
    return made


@pytest.mark.parametrize("splits", [False, True])
def test_results_within_a_saved_data_set_are_none_of_its_data(tmp_path, splits):
    path, data = tmp_path / "saved", datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict(test=data) if splits else data).save_to_disk(path)
    source, out = f"{path}:test" if splits else str(path), path / "answers.jsonl"
    for _ in range(2):
        check_writable(str(out), data=[source])
        write_json_lines(out, ROWS)
        assert read_rows(source) == ROWS
    written = [file for file in path.rglob("*") if file.is_file() and file != out]
    assert sorted(files_of_folder(path)) == sorted(written)
    for file in written:
        with pytest.raises(ValueError, match="results would replace"):
            check_writable(str(file), data=[source])


def test_a_card_says_which_files_are_data(path):
    a, b = (write_json_lines(path / f"{name}.jsonl", ROWS) for name in "ab")
    write_table(path / "c.csv", ROWS)
    card, said = path / "README.md", 'configs:\n- config_name: default\n  data_files: "a.jsonl"\n'
    card.write_text(f"---\n{said}---\n# Reviews\n")
    assert files_of_folder(path) == [a] and read_rows(str(path)) == ROWS
    check_writable(str(b), data=[str(path)])
    with pytest.raises(ValueError, match="results would replace"):
        check_writable(str(a), data=[str(path)])
    card.write_text(f"# Reviews\nSay\n{said}")  # as prose, which `datasets` does not read
    with pytest.raises(ValueError, match="of several kinds"):
        read_rows(str(path))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_licences_beside_data_are_none(path, kind):
    data = path / f"data [1].{kind}"
    (write_json_lines if kind == "jsonl" else write_table)(data, ROWS)
    for name in ("LICENSE", "LICENSE.txt", "requirements.txt", "NOTICE.txt"):
        (path / name).write_text("all rights\nreserved\n")
    assert read_rows(str(path)) == ROWS
    assert path / "LICENSE.txt" not in files_of_folder(path)
    (path / "reviews.txt").write_text("the film\n")
    with pytest.raises(ValueError, match=r"several kinds, .*reviews\.txt \(text\)"):
        read_rows(str(path))
    data.unlink()
    (path / "reviews.txt").unlink()
    assert {"text": "reserved"} in read_rows(str(path))  # as `datasets` reads them


def test_licences_beside_splits_are_none(path):
    for split in ("train", "test"):
        (path / split).mkdir()
        write_json_lines(path / split / "a.jsonl", ROWS[split == "test" :])
        (path / split / "LICENSE.txt").write_text("all rights reserved\n")
    assert read_rows(f"{path}:train") == ROWS and read_rows(f"{path}:test") == ROWS[1:]


@pytest.mark.parametrize("name", ["b.zip", "b.geoparquet"])
def test_no_data_are_left_out_beside_licences(path, name):
    if name == "b.zip":
        write_json_lines(path / "a.jsonl", ROWS)
        with zipfile.ZipFile(path / name, "w") as archive:
            archive.write(path / "a.jsonl", "b.jsonl")
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path / "a.parquet")
        shutil.copy(path / "a.parquet", path / name)
    assert read_rows(str(path)) == ROWS * 2
    (path / "LICENSE.txt").write_text("all rights reserved\n")
    with pytest.raises(ValueError, match=rf"has {name}, which .* beside LICENSE.txt; take the lat"):
        read_rows(str(path))


@pytest.mark.parametrize("form", ["saved", "splits", "hub"])
def test_classes_of_a_data_set_have_names(path, tmp_path, form):
    names = ["neg", "pos"]
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    data = datasets.Dataset.from_list(ROWS, features=datasets.Features(features))
    source = tmp_path / "saved"
    if form == "hub":
        data.to_parquet(path / "a.parquet")
        source = path
    else:
        (datasets.DatasetDict(test=data) if form == "splits" else data).save_to_disk(source)
    assert read_named(str(source)) == (ROWS, {"label": names})
    assert read_named(str(write_json_lines(tmp_path / "a.jsonl", ROWS))) == (ROWS, {})


@pytest.mark.parametrize("form", ["saved", "hub"])
def test_classes_of_lists_have_names(path, tmp_path, form):
    names, rows = ["neg", "pos"], [{**row, "label": [1, 0]} for row in ROWS]
    lists = datasets.Sequence(datasets.ClassLabel(names=names))
    features = datasets.Features({"text": datasets.Value("string"), "label": lists})
    data = datasets.Dataset.from_list(rows, features=features)
    if form == "hub":
        data.to_parquet(path / "a.parquet")
    else:
        path = tmp_path / "saved"
        data.save_to_disk(path)
    assert read_named(str(path)) == (rows, {"label": names})
