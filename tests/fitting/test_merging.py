"""Merged posteriors equal one fit."""

import pytest
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LoraEF, LoraGGN
from support.batches import loader, token_batch
from support.models import excite, peft_model
from support.posteriors import EVERY_CLASS, LOW, fitted
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
def test_merged_posteriors_equal_one_fit(cls, kwargs):
    model = peft_model("bert")
    whole = fitted(cls, model, **kwargs)
    examples = loader().dataset
    parts = []
    for some in (examples[:2], examples[2:3], examples[3:]):
        la = cls(model, "classification", **kwargs)
        la.fit(DataLoader(some, batch_size=2))
        parts.append(la)
    parts[0].merge(parts[1:])
    assert parts[0].n_data == whole.n_data
    parts[0].prior_precision = whole.prior_precision
    assert_near(parts[0].log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert_near(parts[0](BATCH), whole(BATCH))


def test_what_does_not_belong_together_is_not_merged():
    model = peft_model("bert")
    la = fitted(model=model)
    with pytest.raises(ValueError, match="one class with the same arguments"):
        la.merge([fitted(DiagLoraLaplace, model)])
    with pytest.raises(ValueError, match="one class with the same arguments"):
        la.merge([fitted(model=model, **LOW)])
    other = excite(peft_model("bert"), 0.2)
    with pytest.raises(ValueError, match="weights are not those"):
        la.merge([fitted(model=other)])


def test_curvatures_of_different_kinds_are_not_merged(tmp_path):
    class Mine(LoraGGN):
        """A user's own."""

    model = peft_model("bert")
    ours = "laplace_lora.curvature.backends.Lora"
    la, other = fitted(model=model), fitted(model=model, backend=LoraEF)
    with pytest.raises(ValueError, match=f"one backend merge, got {ours}GGN and {ours}EF"):
        la.merge([other])
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"one backend merge, got {ours}GGN and {ours}EF"):
        la.merge([KronLoraLaplace.from_pretrained(model, tmp_path)])
    mine = fitted(model=model, backend=Mine)
    with pytest.raises(ValueError, match=f"got {ours}GGN and .*test_merging.*Mine"):
        la.merge([mine])
    mine.merge([fitted(model=model, backend=Mine)])
    assert mine.n_data == 2 * la.n_data
