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
    """Reads token after token, up to the end of the longest text or of the padding."""

    def __init__(self, whole):
        super().__init__()
        self.words, self.cell = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)
        self.head, self.whole = nn.Linear(4, 3), whole

    def forward(self, input_ids, attention_mask):
        words, state = self.words(input_ids), self.words.weight.new_zeros(len(input_ids), 4)
        steps = input_ids.shape[1] if self.whole else int(attention_mask.sum(1).max())
        for k in range(steps):
            is_real = attention_mask[:, k : k + 1].to(state)
            state = torch.where(is_real > 0, torch.tanh(self.cell(state) + words[:, k]), state)
        return self.head(state)


def posterior(whole, **options):
    torch.manual_seed(0)
    model = excite(get_peft_model(Recurrent(whole), LoraConfig(r=2, target_modules=["cell"])))
    return KronLoraLaplace(model.double().eval(), "classification", **options)


def fitted(la, **padding):
    la.fit(DataLoader([token_batch((5, 3, 4), **padding)], batch_size=None))
    return la.log_marginal_likelihood()


@pytest.mark.parametrize("whole", [True, False])
def test_padded_texts_are_refused(whole):
    with pytest.raises(RuntimeError, match=r"ran \d times .* uncovered='diag'"):
        fitted(posterior(whole), pad_to=7)
    evidence = fitted(posterior(whole, uncovered="diag"))
    assert_near(fitted(posterior(whole, uncovered="diag"), pad_to=7), evidence)


def test_texts_of_one_length_are_fitted():
    la = posterior(True)
    la.fit(DataLoader([token_batch((5, 5, 5))], batch_size=None))
    assert la.n_data == 3
