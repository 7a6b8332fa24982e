"""Batches whose tokens or masks are of another form are refused by what to do."""

import pytest
import torch

from support.generation import answers_posterior
from support.language import language_posterior, text_batch
from support.spans import question_batch, span_posterior
from support.tokens import tagged_batch, tagged_posterior

KINDS = {
    "language": (language_posterior, text_batch),
    "tags": (tagged_posterior, tagged_batch),
    "spans": (span_posterior, question_batch),
}


def fit(la, batch):
    la.fit(torch.utils.data.DataLoader([batch], batch_size=None))


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_tokens(kind):
    posterior, make = KINDS[kind]
    for name in ("input_ids", "attention_mask"):
        batch = make()
        with pytest.raises(TypeError, match=f"'{name}' of the batch is a list.*return_tensors"):
            fit(posterior(fit=False), {**batch, name: batch[name].tolist()})


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_are_no_list_of_tokens(kind):
    posterior, make = KINDS[kind]
    batch = make()
    texts, tokens = batch["input_ids"].shape
    for shape in ((texts, 1, tokens, tokens), (texts, tokens + 1)):
        with pytest.raises(ValueError, match=r"mask of shape .* one entry per token"):
            fit(posterior(fit=False), {**batch, "attention_mask": torch.ones(shape)})


@pytest.mark.parametrize("texts", [1, 3])
def test_masks_of_answers_that_are_no_list_of_tokens(texts):
    ids = torch.arange(1, 7).repeat(texts, 1)
    mask = torch.ones(texts, 1, 6, 6).tril()
    with pytest.raises(ValueError, match="does not say where a text ends"):
        answers_posterior()({"input_ids": ids, "attention_mask": mask})
