"""Which layers see a row of each text, by what they see of texts without images."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from laplace_lora.adapters.discovery import trainable_maps
from laplace_lora.capture.recorder import record
from laplace_lora.capture.text_layers import layers_of_texts

CONFIG = SimpleNamespace(image_token_id=55)
BATCH = {
    "input_ids": torch.tensor([[55, 7, 8], [55, 55, 9]]),
    "attention_mask": torch.ones(2, 3, dtype=torch.long),
    "pixel_values": torch.ones(2, 3, 4, 4),
}


class Model(nn.Module):
    """Runs its tower on an empty image of each text where there is none, as some do."""

    def __init__(self, without):
        super().__init__()
        self.without = without
        self.embedding = nn.Embedding(60, 4).requires_grad_(False)
        self.tower, self.text, self.shared = nn.Linear(16, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch):
        ids = batch["input_ids"]
        images = batch.get("pixel_values")
        if images is None and self.without == "empty":
            images = torch.zeros(len(ids), 3, 4, 4)
        if images is None and self.without == "fails":
            raise AttributeError("no images")
        states = self.shared(self.text(self.embedding(ids)))
        if images is not None:
            states = states + self.shared(self.tower(images.flatten(2)))
        return states.sum(1)


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("none", {("text", 1), ("shared", 1)}),
        ("empty", {("text", 1)}),
        ("fails", set()),
    ],
)
def test_towers_are_not_taken_for_layers_of_texts(without, expected):
    model = Model(without)
    maps = trainable_maps(model, "error")[0]
    alone = partial(record, model, maps, examples=2, skip_idle=True)
    assert layers_of_texts(BATCH, CONFIG, alone) == expected


def test_texts_without_two_words_tell_nothing():
    batch = {"input_ids": torch.tensor([[55, 7], [55, 7]])}
    assert layers_of_texts(batch, CONFIG, lambda texts: pytest.fail("runs")) == set()
