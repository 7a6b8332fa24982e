"""Which tokens of a layer's input are real, where no mask has its shape."""

import pytest
import torch

from laplace_lora.data.masks import token_mask

INPUTS = torch.zeros(3, 2, 5)  # of three texts, twice as many rows


def mask(*shape):
    return torch.ones(shape, dtype=torch.long)


def test_no_row_of_a_text_of_one_token_is_padding():
    assert token_mask({"attention_mask": mask(3, 1)}, INPUTS, "layer") is None


@pytest.mark.parametrize(
    "masks",
    [
        {"attention_mask": mask(3, 4)},
        {"attention_mask": mask(2, 1)},
        {"attention_mask": torch.tensor([[1], [0], [1]])},
        {"attention_mask": mask(3, 1), "pixel_attention_mask": mask(3, 9)},
        {"attention_mask": mask(3, 1), "decoder_attention_mask": mask(3, 4)},
    ],
)
def test_what_may_be_no_tokens_of_a_text_is_refused(masks):
    with pytest.raises(ValueError, match="so padding is unknown"):
        token_mask(masks, INPUTS, "layer")


MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
LENGTHS = torch.tensor([2, 4])
TEXTS = torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    "key,value,inputs",
    [
        ("mask_a", MASK, TEXTS),
        ("mask_a", MASK == 0, TEXTS),
        ("mask_a", MASK.float(), torch.cat([TEXTS, TEXTS])),  # both texts of a pair in one call
        ("choices_mask", MASK.unsqueeze(0), TEXTS),
        ("lengths", LENGTHS, TEXTS),
        ("seq_length", LENGTHS, torch.cat([TEXTS, TEXTS])),
        ("lengths", torch.tensor([3, 3]), TEXTS),
    ],
)
def test_masks_and_lengths_of_other_names_are_refused(key, value, inputs):
    with pytest.raises(ValueError, match=f"'{key}' of the batch may say which tokens"):
        token_mask({key: value}, inputs, "layer")


@pytest.mark.parametrize(
    "key,value,inputs",
    [
        ("mask_a", torch.ones_like(MASK), TEXTS),
        ("mask_a", MASK[:, :3], TEXTS),
        ("mask_a", 2 * MASK, TEXTS),
        ("mask_a", MASK, TEXTS[:, 0]),
        ("special_tokens_mask", MASK, TEXTS),
        ("lengths", torch.tensor([4, 4]), TEXTS),
        ("lengths", torch.tensor([2, 9]), TEXTS),  # of something else, as of letters
        ("lengths", LENGTHS / 4, TEXTS),
        ("prompt_length", LENGTHS, TEXTS),
        ("labels_mask", MASK, TEXTS),
    ],
)
def test_what_tells_nothing_of_padding_is_passed_over(key, value, inputs):
    assert token_mask({key: value}, inputs, "layer") is None


def test_an_encoder_s_mask_says_nothing_of_a_decoder_s_tokens():
    batch = {"input_ids": MASK, "attention_mask": MASK, "decoder_input_ids": MASK}
    batch["length"] = LENGTHS
    assert token_mask(batch, TEXTS, "layer", "decoder") is None
