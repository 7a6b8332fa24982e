"""Which texts of a batch speak of an image, and whether batches can be divided."""

from types import SimpleNamespace

import pytest
import torch

from laplace_lora.models.inputs.image_rows import divides, texts_with_images

IMAGE, VIDEO = 55, 56
CONFIG = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)
PIXELS = torch.zeros(3, 3, 8, 8)


def texts(*tokens):
    return torch.tensor([[5, *row, 6] for row in tokens])


EVEN = texts([IMAGE] * 2, [IMAGE, 7], [8, IMAGE])  # images of several sizes
UNEVEN = texts([IMAGE] * 2, [IMAGE, 7], [7, 8])
NONE = texts([7, 8], [8, 7], [9, 9])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": EVEN, "pixel_values": PIXELS}, True),
        ({"input_ids": UNEVEN, "pixel_values": PIXELS}, False),
        ({"input_ids": NONE, "pixel_values": PIXELS}, True),  # the model's tokens say nothing
        ({"input_ids": UNEVEN}, True),  # no image at all
        ({"input_ids": UNEVEN, "pixel_values": torch.zeros(3, 2, 1, 3, 8, 8)}, True),  # by text
        ({"input_ids": UNEVEN, "pixel_values": PIXELS[:, None]}, False),
        ({"input_ids": EVEN, "pixel_values": PIXELS[:2]}, False),  # by its shape
        ({"pixel_values": PIXELS}, True),
        (({"input_ids": UNEVEN, "pixel_values": PIXELS}, torch.zeros(3)), False),
        (PIXELS, True),
    ],
)
def test_batches_divide_where_every_text_has_its_row(batch, expected):
    assert divides(batch, CONFIG) is expected


def test_without_a_configuration_shapes_decide():
    assert divides({"input_ids": UNEVEN, "pixel_values": PIXELS}, None)


def test_both_texts_of_a_pair_count():
    pairs = {"input_ids_chosen": EVEN, "pixel_values_chosen": PIXELS}
    pairs |= {"input_ids_rejected": EVEN, "pixel_values_rejected": PIXELS}
    assert divides(pairs, CONFIG)
    assert not divides({**pairs, "input_ids_rejected": UNEVEN}, CONFIG)


def test_images_and_videos_are_told_apart():
    """As many images as texts may stand beside videos of the other texts."""
    ids = texts([IMAGE] * 2, [IMAGE] * 2, [VIDEO] * 2)
    batch = {"input_ids": ids, "pixel_values": PIXELS, "pixel_values_videos": PIXELS[:, None]}
    found = texts_with_images(batch, CONFIG)
    assert sorted(found.sum(1).tolist()) == [1, 2] and not divides(batch, CONFIG)
    assert divides({**batch, "input_ids": texts(*[[IMAGE, VIDEO]] * 3)}, CONFIG)


def test_older_names_and_configurations_of_the_text_are_read():
    batch = {"input_ids": UNEVEN, "pixel_values": PIXELS}
    inner = SimpleNamespace(image_token_index=IMAGE)
    assert not divides(batch, inner)
    assert not divides(batch, SimpleNamespace(get_text_config=lambda: inner))
