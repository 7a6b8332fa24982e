"""Texts whose logits are not finite are named, where samples and exact moments gave no number."""

import pytest
import torch

from laplace_lora.generation import generate, score
from support.generation import K, seeded
from support.language import language_posterior, text_batch
from support.models import VOCABULARY


def poison(la, token):
    """Let a fitted model have no number for a token."""

    def without(_, args, embedded):
        return embedded.masked_fill((args[0] == token).unsqueeze(-1), torch.nan)

    la.logits_model.model.get_input_embeddings().register_forward_hook(without)


@pytest.mark.parametrize("method", ["sampled", "exact"])
def test_texts_whose_logits_are_not_finite_are_named(method):
    la, batch = language_posterior(prior_precision=20.0), text_batch()
    poison(la, VOCABULARY - 1)
    assert len(batch["input_ids"]) > 2
    expected = score(la, batch, K, method=method, generator=seeded())
    assert bool(expected.log_prob.isfinite().all())
    batch["input_ids"][2, 0] = VOCABULARY - 1
    for size in (None, 1):
        with pytest.raises(FloatingPointError, match=r"not finite at rows \[2\] of the batch"):
            score(la, batch, K, method=method, batch_size=size)
    prompts = batch["input_ids"][:, :2]
    with pytest.raises(FloatingPointError, match=r"not finite at rows \[2\] of the batch"):
        generate(la, prompts, 2, K, method=method)


@pytest.mark.parametrize("method", ["sampled", "exact"])
def test_prompts_keep_their_numbers_when_others_end(method):
    """A text whose second token is poison is named by its row, after the first text has ended."""
    la = language_posterior(prior_precision=20.0)
    prompts = text_batch()["input_ids"][:3, :2]
    first = generate(la, prompts, 1, K, method=method, eos_token_id=[]).tokens[:, 0].tolist()
    assert len(set(first)) > 1
    last = next(n for n in range(3) if first[n] != first[0] and first[n] not in prompts)
    poison(la, first[last])
    rows = [n for n in range(3) if first[n] == first[last]]
    with pytest.raises(FloatingPointError, match=rf"not finite at rows \{rows} of"):
        generate(la, prompts, 3, K, method=method, eos_token_id=[first[0]])
