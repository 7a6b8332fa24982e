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
