"""A layer that runs once for each token of padded texts has no Kronecker factors."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from support.batches import token_batch
from support.models import VOCABULARY, excite
from support.references import assert_near


class Recurrent(nn.Module):
    """Reads token after token: all, up to the end of the longest text, all but one, or twice."""

    def __init__(self, way):
        super().__init__()
        self.words, self.cell = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)
        self.head, self.way = nn.Linear(4, 3), way

    def forward(self, input_ids, attention_mask):
        words, state = self.words(input_ids), self.words.weight.new_zeros(len(input_ids), 4)
        every = list(range(input_ids.shape[1]))
        longest = int(attention_mask.sum(1).max())
        ways = {"longest": every[:longest], "but one": every[1:], "twice": every + every[::-1]}
        for k in ways.get(self.way, every):
            is_real = attention_mask[:, k : k + 1].to(state)
            state = torch.where(is_real > 0, torch.tanh(self.cell(state) + words[:, k]), state)
        return self.head(state)


def posterior(way, **options):
    torch.manual_seed(0)
    model = excite(get_peft_model(Recurrent(way), LoraConfig(r=2, target_modules=["cell"])))
    return KronLoraLaplace(model.double().eval(), "classification", **options)


def fitted(la, **padding):
    batches = [token_batch((6, 6), **padding), token_batch((5, 3, 4), **padding)]
    la.fit(DataLoader(batches, batch_size=None))
    return la.log_marginal_likelihood()


@pytest.mark.parametrize("way", ["all", "longest", "but one", "twice"])
def test_padded_texts_are_refused(way):
    with pytest.raises(RuntimeError, match=r"ran \d+ times .* uncovered='diag'"):
        fitted(posterior(way), pad_to=7)
    la = posterior(way, uncovered="diag")
    with pytest.raises(RuntimeError, match="it now uses a diagonal block, so fit again"):
        fitted(la, pad_to=6)  # the first batch has no padding
    evidence = fitted(la, pad_to=6)
    assert_near(fitted(la, pad_to=7), evidence)


def test_texts_of_one_length_are_fitted():
    la = posterior("all")
    la.fit(DataLoader([token_batch((5, 5, 5))], batch_size=None))
    assert la.n_data == 3


class Repeated(nn.Module):
    """One head, five times, as over the states of five layers."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        first = self.words(input_ids[:, 0])
        return sum(self.head(first * k) for k in range(1, 6))


@pytest.mark.parametrize("lengths", [(7, 4, 3), (6, 4, 3), (5, 4, 3)])
def test_heads_that_run_as_often_as_texts_have_tokens_by_chance_are_fitted(lengths):
    torch.manual_seed(0)
    model = excite(get_peft_model(Repeated(), LoraConfig(r=2, target_modules=["head"])))
    la = KronLoraLaplace(model.double().eval(), "classification")
    la.fit(DataLoader([token_batch((8, 3, 2)), token_batch(lengths)], batch_size=None))
    assert la.n_data == 6
