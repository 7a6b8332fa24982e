"""Merged posteriors equal one fit."""

from functools import partial

import pytest
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraEF, LoraGGN
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


def logits_of(returned, factor=1):
    return factor * returned.logits


def halves_of(returned):
    return returned.logits / 2


class Reader:
    """Reads logits as an object."""

    def __call__(self, returned):
        return returned.logits


@pytest.mark.parametrize("other", [None, halves_of, Reader(), lambda returned: returned.logits])
def test_outputs_that_are_read_by_others_are_not_merged(other):
    model = peft_model("bert")
    la = fitted(model=LogitsModel(model, output=logits_of))
    different = fitted(model=LogitsModel(model, output=other))
    n_data = la.n_data
    for one, two in ((la, different), (different, la)):
        with pytest.raises(ValueError, match=r"output=.*test_merging\.logits_of\)"):
            one.merge([two])
    assert la.n_data == n_data


@pytest.mark.parametrize("pair", [(None, None), (logits_of, logits_of), (Reader(), Reader())])
def test_outputs_that_are_read_alike_are(pair):
    model = peft_model("bert")
    la, other = (fitted(model=LogitsModel(model, output=output)) for output in pair)
    la.merge([other])
    assert la.n_data == 2 * other.n_data


def test_arguments_that_are_bound_do_not_change_a_functions_name():
    model = peft_model("bert")
    bound = partial(logits_of, factor=1)
    la = fitted(model=LogitsModel(model, output=bound))
    la.merge([fitted(model=LogitsModel(model, output=logits_of))])
    with pytest.raises(ValueError, match="make both with one function"):
        la.merge([fitted(model=LogitsModel(model, output=partial(halves_of)))])
