"""The part of some training texts whose predictions a tuning looks at."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora.data.distributed import ALONE
from laplace_lora.tuning.texts import training_texts
from laplace_lora.tuning.texts.training_texts import some_texts, text_losses
from support.spans import question_batch, question_loader, span_posterior

LENGTHS, STARTS, ENDS = (5, 7, 4, 6, 3), (1, 2, 0, 1, 2), (3, 2, 0, 5, 2)


def whole_batch(**tensors):
    """A loader of one batch of questions, with further tensors."""
    batch = {**question_batch(LENGTHS, STARTS, ENDS), **tensors}
    return DataLoader([batch], batch_size=None)


def test_questions_that_cannot_be_cut_out_of_their_batch_are_scored_alone(monkeypatch):
    """One row of positions for all of them; the others are read with them, and do not count."""
    monkeypatch.setattr(training_texts, "TEXTS", 2)
    la = span_posterior(fit=False)
    positions = torch.arange(max(LENGTHS))[None]
    la.fit(whole_batch())
    widths, found = torch.tensor([1.0, 0.1]), []
    for rows in (1, len(LENGTHS)):
        loader = whole_batch(position_ids=positions.expand(rows, -1))
        texts = some_texts(la.fitted, loader)
        assert len(texts[0]["labels"]) == (len(LENGTHS) if rows == 1 else 2)
        found.append(text_losses(la.fitted, texts, widths, ALONE))
    for_all, for_each = found
    assert for_all.tokens == for_each.tokens == 4  # two starts and two ends
    assert for_all.nll_map == pytest.approx(for_each.nll_map)
    torch.testing.assert_close(for_all.nll, for_each.nll)
    la.optimize_prior_precision(train_loader=whole_batch(position_ids=positions))
    assert la.tuning.method == "widest"


def test_texts_without_a_mask_are_as_long_as_their_tokens(monkeypatch):
    """Questions have two labels each, whatever is read."""
    monkeypatch.setattr(training_texts, "TOKENS", 2 * 5)
    batch = question_batch((5, 5, 5, 5), (1, 2, 0, 1), (3, 2, 0, 4))
    la = span_posterior(fit=False)
    la.fit(question_loader(2, batch))
    del batch["attention_mask"]
    texts = some_texts(la.fitted, question_loader(2, batch))
    assert sum(len(part["labels"]) for part in texts) == 2
