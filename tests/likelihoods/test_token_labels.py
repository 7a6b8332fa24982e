"""Which labels of a text count."""

import pytest
import torch

from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from support.language import text_batch

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def test_labels_that_padding_would_predict_do_not_count():
    """With left padding the first real token has nothing real before it."""
    left, right = (text_batch(prompts=(0, 0, 0), pad_to=7, side=side) for side in ("left", "right"))
    counted = [token_labels(batch, batch["labels"]) for batch in (left, right)]
    assert [(labels != IGNORED).sum(1).tolist() for labels in counted] == [[3, 5, 2]] * 2
    assert (left["labels"] != IGNORED).sum(1).tolist() == [4, 6, 3]
    everything = {**right, "labels": right["input_ids"]}
    assert torch.equal(token_labels(everything, everything["labels"]), counted[1])
