"""Kinds of batches: which take equally many passes of a model."""

import pytest
import torch

from laplace_lora.models.inputs.batch_kinds import kind_of
from support.batches import rows, token_batch
from support.vision import image_text_model, image_texts

BATCH = token_batch((3, 2, 4))


def form(batch, config=None):
    return kind_of(batch, config)[0]


def traits(batch):
    return kind_of(batch, None)[1]


def test_numbers_of_examples_and_tokens_are_no_form():
    assert form(BATCH) == form(token_batch((6, 2))) == form(rows(BATCH, slice(1)))
    assert form((BATCH, torch.zeros(3))) == form(BATCH)  # labels beside the inputs
    embeds = {"inputs_embeds": torch.zeros(2, 3, 8)}
    assert form(embeds) == form({"inputs_embeds": torch.zeros(3, 5, 8)})
    assert form(torch.zeros(2, 5)) == form(torch.zeros(3, 4))


def test_inputs_and_numbers_of_choices_are():
    less = {key: value for key, value in BATCH.items() if key != "attention_mask"}
    assert form(less) != form(BATCH)
    two, three = ({"input_ids": torch.ones(4, n, 6).long()} for n in (2, 3))
    assert form(two) != form(three)


def test_padding_on_either_side_and_single_examples_are_traits():
    equal, padded = token_batch((3, 3)), token_batch((3, 2))
    before = {**padded, "attention_mask": padded["attention_mask"].flip(1)}
    single = rows(equal, slice(1))
    found = [traits(batch) for batch in (equal, padded, before, single)]
    assert len(set(found)) == 4
    assert traits(token_batch((5, 5, 5))) == found[0] and traits(BATCH) == found[1]


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_only_images_of_each_text_have_a_kind(kind):
    config = image_text_model(kind).config
    one, other = (image_texts((1, 1), kind, tails=tails)[0] for tails in ((2, 3), (4, 1)))
    assert form(one, config) == form(other, config)
    assert kind_of(image_texts((1, 0), kind, tails=(2, 3))[0], config) is None
    more = image_texts((1, 1, 1), kind, tails=(2, 3, 1))[0]
    assert form(more, config) != form(one, config)  # a tower may run image by image
    text = {key: value for key, value in one.items() if not key.startswith("pixel")}
    assert form(text, config) != form(one, config)
