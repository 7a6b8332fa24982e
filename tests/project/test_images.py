"""The example of images on tiny settings: a table of methods, and a picture."""

import sys

import pytest

from support.examples import imported

pytestmark = pytest.mark.slow


@pytest.fixture
def example(monkeypatch):
    return imported("images", monkeypatch)


def test_later_digits_are_mirrored_and_the_others_as_they_were(example):
    from sklearn.datasets import load_digits
    from transformers import ViTImageProcessor

    half = [0.5] * 3
    processor = ViTImageProcessor(do_resize=False, image_mean=half, image_std=half, size=8)
    rows, table = example.digits(processor), load_digits()
    assert [int(row["labels"]) for row in rows] == table.target.tolist()
    for n, image in ((0, table.images[0]), (example.UPRIGHT, table.images[example.UPRIGHT].T)):
        expected = (image * 255 / 16).astype("uint8") / 127.5 - 1
        for channel in rows[n]["pixel_values"].double().numpy():
            assert abs(channel - expected).max() < 1e-6


def test_a_table_of_three_methods_and_the_least_certain_images(
    example, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(example, "PRETRAINING_EPOCHS", 1)
    shown = []
    draw = example.draw
    monkeypatch.setattr(
        example, "draw", lambda rows, found, path: shown.append(found) or draw(rows, found, path)
    )
    picture = tmp_path / "least_certain.png"
    sizes = ["--train-size", "20", "--val-size", "869", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["images.py", *sizes, "--picture", str(picture)])
    example.main()
    printed = capsys.readouterr().out
    for method in ("MAP", "temperature scaling", "Laplace"):
        assert f"| {method} " in printed
    assert len(shown[0].probs) == 8 and picture.stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["images.py", "--train-size", "800", "--val-size", "97"])
    with pytest.raises(SystemExit):
        example.main()
