"""Texts joined in one row, as padding-free collators make them, do not see each other."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from laplace_lora import KronLoraLaplace
from laplace_lora.generation import score
from laplace_lora.generation.label_scores import part_of
from laplace_lora.likelihoods.language_modeling import IGNORED
from support.batches import rows
from support.generation import FIELDS, K, seeded
from support.language import language_posterior, text_batch, text_loader
from support.models import excite

OPT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
NAMES = tuple(name for name in FIELDS if name != "log_prob_variance")


def joined(batch, groups):
    """Rows of several texts each, with positions that start anew and no mask."""
    texts = [rows(batch, n) for n in range(len(batch["labels"]))]
    bare = [{k: v[text["attention_mask"] == 1] for k, v in text.items()} for text in texts]
    for text in bare:
        text["position_ids"] = torch.arange(len(text["input_ids"]))
        text["labels"][0] = IGNORED
    names = ("input_ids", "labels", "position_ids")
    return {
        name: torch.stack([torch.cat([bare[n][name] for n in group]) for group in groups])
        for name in names
    }


@pytest.mark.parametrize("method", ["sampled", "exact"])
@pytest.mark.parametrize("groups", [[(0, 1, 2)], [(0, 1), (1, 0)]])
def test_they_are_scored_as_they_are_alone(method, groups):
    la = language_posterior()
    batch = text_batch((4, 6, 3))
    alone = score(la, batch, K, generator=seeded(), method=method)
    together = score(la, joined(batch, groups), K, generator=seeded(), method=method)
    for row, group in enumerate(groups):
        for name in NAMES:
            one = torch.cat([getattr(alone, name)[n][alone.mask[n]] for n in group])
            theirs = getattr(together, name)[row][together.mask[row]]
            torch.testing.assert_close(theirs, one, atol=1e-8, rtol=1e-8)


def test_texts_that_the_model_reads_together_are_pointed_out():
    """OPT numbers tokens by itself, and looks at all of a row."""
    config = OPTConfig(**OPT)
    torch.manual_seed(0)
    base = OPTForCausalLM(config)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = excite(get_peft_model(base, lora)).double().eval()
    batch = joined(text_batch((4, 6, 3)), [(0, 1, 2)])
    la = KronLoraLaplace(model, "language_modeling")
    with pytest.warns(UserWarning, match="joined in one row together: alone, one has other logits"):
        la.fit(text_loader(1, batch))
    language_posterior(fit=False).fit(text_loader(1, batch))  # without a word


def test_tuning_reads_them_as_the_fit_does():
    la = language_posterior(fit=False)
    la.fit(text_loader(1, joined(text_batch((4, 6, 3)), [(0, 1, 2)])))
    la.optimize_prior_precision()
    assert la.tuning.widest.nll_map == pytest.approx(la.loss / 7)


def test_a_part_of_a_row_has_no_bounds_that_reach_beyond_it():
    bounds = {"cu_seq_lens_q": torch.tensor([0, 4, 10, 13]), "max_length_q": 6}
    batch = {**joined(text_batch((4, 6, 3)), [(0, 1, 2)]), **bounds}
    row = torch.tensor([0])
    assert bounds.keys() <= part_of(batch, row, 13, None).keys()
    assert not bounds.keys() & part_of(batch, row, 12, None).keys()
