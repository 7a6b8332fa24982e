"""Preference pairs: their forms, their shares of a sampler, and bad ones."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import BatchEncoding

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
)
from laplace_lora.data import shares
from laplace_lora.data.batches import batch_length, first_examples
from laplace_lora.data.pairs import as_pairs
from laplace_lora.evaluation import MAP, TemperatureScaling, evaluate
from support.posteriors import DENSE, LOW
from support.preferences import CHOSEN, half_of, pair_batch, pair_loader, reward_posterior, texts
from support.references import assert_near

EVERY_CLASS = [
    (KronLoraLaplace, DENSE),
    (KronLoraLaplace, LOW),
    (DiagLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (DiagLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
]


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
def test_the_fit_does_not_depend_on_batches_padding_and_form(cls, kwargs):
    reference = reward_posterior(cls, **kwargs)
    batch = pair_batch()
    turned = {
        key.replace(*ends): value
        for key, value in batch.items()
        for ends in (("chosen", "rejected") if "chosen" in key else ("rejected", "chosen"),)
    }
    wide = pair_batch(pad_to=(9, 9))
    stacked = {
        key: torch.cat([half_of(wide, half)[key] for half in ("chosen", "rejected")])
        for key in ("input_ids", "attention_mask")
    }
    forms = {
        "one by one": pair_loader(1),
        "left": pair_loader(3, pad_to=(8, 10), side="left"),
        "labelled": pair_loader(5, {**batch, "labels": torch.ones(5)}),
        "turned": pair_loader(5, {**turned, "labels": torch.zeros(5, dtype=torch.long)}),
        "encoding": DataLoader([0], collate_fn=lambda _: BatchEncoding({**batch, "margin": 0})),
        "and labels": DataLoader([0], collate_fn=lambda _: (batch, torch.ones(5))),
        "stacked": DataLoader([0], collate_fn=lambda _: stacked),
    }
    new = pair_batch(seed=1)
    for form in forms.values():
        la = reward_posterior(cls, fit=False, **kwargs)
        la.fit(form)
        assert la.n_data == 5
        assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
        assert_near(la(new), reference(new))


def test_shares_of_a_sampler_count_pairs(monkeypatch):
    batch = pair_batch()
    assert batch_length(batch) == 5
    assert {len(v) for v in first_examples(batch, 2).values()} == {2}
    la = reward_posterior(fit=False)
    examples = pair_loader(pad_to=(9, 9)).dataset

    def stacked(rows):
        halves = [half_of(row, name) for name in ("chosen", "rejected") for row in rows]
        return {key: torch.stack([half[key] for half in halves]) for key in halves[0]}

    monkeypatch.setattr(shares, "processes", lambda: 2)
    sampler = DistributedSampler(examples, 2, 1, shuffle=False)
    data = DataLoader(examples, 2, sampler=sampler, collate_fn=stacked)
    share = shares.share_of(data)
    ((pairs, places),) = share.of(map(la.parts.by_example, data))
    assert places.tolist() == [1, 3] and len(pairs["labels"]) == 2  # of five
    assert torch.equal(pairs["input_ids_rejected"][1], examples[3]["input_ids_rejected"])


BATCH = pair_batch()

SINGLE = texts(CHOSEN, 0)


@pytest.mark.parametrize("cls,kwargs", [(KronLoraLaplace, LOW), (FullLoraLLLaplace, {})])
@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (
            half_of(BATCH, "rejected") | {"input_ids_chosen": BATCH["input_ids_chosen"]},
            ValueError,
            r"lacks \['input_ids_rejected'\]",
        ),
        (
            {k: v for k, v in BATCH.items() if k != "attention_mask_chosen"},
            ValueError,
            r"lacks \['attention_mask_chosen'\]",
        ),
        (
            {k: v[:3] if "chosen" in k else v for k, v in BATCH.items()},
            ValueError,
            r"\[3, 3\] chosen, but \[5, 5\] rejected",
        ),
        ({**BATCH, "labels": torch.tensor([0, 1, 2, 0, 1])}, ValueError, "1 where the chosen"),
        ({**BATCH, "labels": torch.tensor([0.0, 0.3, 1, 0, 1])}, ValueError, "1 where the chosen"),
        ({**BATCH, "labels": torch.ones(4)}, ValueError, "labels of 5 pairs must be 5 values"),
        ({**BATCH, "margin": torch.ones(5)}, ValueError, "remove 'margin'"),
        ({**SINGLE, "labels": torch.randn(5)}, ValueError, r"pairs are needed here: .* got 5 rows"),
        (SINGLE, ValueError, r"pairs are needed here: .* got 5 rows"),
        (SINGLE["input_ids"], TypeError, "got Tensor"),
        ((SINGLE["input_ids"], torch.ones(5)), TypeError, "got tuple"),
    ],
)
def test_bad_batches_are_refused_and_nothing_is_lost(cls, kwargs, batch, error, match):
    la = reward_posterior(cls, **kwargs)
    before = la(BATCH), la.log_marginal_likelihood()
    bad = DataLoader([0], collate_fn=lambda _: batch)
    with pytest.raises(error, match=match):
        la.fit(bad)
    with pytest.raises(error, match=match):
        la.optimize_prior_precision(method="gridsearch", val_loader=bad, grid_size=2)
    torch.testing.assert_close(la(BATCH), before[0], rtol=0, atol=0)
    assert la.log_marginal_likelihood() == before[1]
    transformer = la.logits_model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer)


def stacked_and_halves():
    """The same pairs in laplace-torch's form, in TRL's newer one, and with suffixes."""
    batch = pair_batch(pad_to=(9, 9))
    sides = [half_of(batch, name) for name in ("rejected", "chosen")]
    stacked = {key: torch.stack([side[key] for side in sides], 1) for key in sides[0]}
    halves = {key: torch.cat([side[key] for side in reversed(sides)]) for key in sides[0]}
    return {**stacked, "labels": torch.ones(5, dtype=torch.long)}, halves, batch


def test_predictions_of_stacked_pairs_say_what_to_give_instead():
    la, (stacked, _, batch) = reward_posterior(), stacked_and_halves()
    model = la.logits_model.model
    baselines = MAP(model), TemperatureScaling(model, [batch])
    for call in (la, la.predict, lambda x: la(x, pred_type="nn", link_approx="mc"), *baselines):
        with pytest.raises(ValueError, match=r"\(5, 2, 9\): predict pairs as laplace_lora\.data"):
            call(stacked)
    assert_near(la(as_pairs(stacked)), la(batch))
    assert_near(la.reward_difference(stacked), la.reward_difference(batch))
    unlabelled = {k: v for k, v in stacked.items() if k != "labels"}
    even = {k: v[:4] for k, v in unlabelled.items()}  # whose first half were taken as chosen
    for bad in (unlabelled, even):
        with pytest.raises(ValueError, match="need 'labels': 1 where the second text wins"):
            la.reward_difference(bad)


def test_evaluations_read_pairs_in_every_form():
    la, (stacked, halves, batch) = reward_posterior(), stacked_and_halves()
    model = la.logits_model.model
    expected = TemperatureScaling(model, [as_pairs(batch)])
    for form in (stacked, halves):
        for predict in (la, la.predict, MAP(model)):
            report, reference = (
                evaluate(predict, [data], bootstrap=2, ood_loader=[data])
                for data in (form, as_pairs(batch))
            )
            assert_near(report.probs, reference.probs)
            assert torch.equal(report.labels, reference.labels)
        scaled = TemperatureScaling(model, [form])
        assert scaled.temperature == pytest.approx(expected.temperature, rel=1e-6)


def test_stacked_pairs_with_a_label_for_each_text_are_refused():
    texts = {"input_ids": torch.ones(3, 2, 4, dtype=torch.long)}
    preferred = torch.tensor([[1, 0], [0, 1], [1, 0]])
    with pytest.raises(ValueError, match="labels of 3 pairs must be 3 values"):
        as_pairs({**texts, "labels": preferred})
    assert as_pairs({**texts, "labels": preferred[:, 1]})["labels"].tolist() == [0, 1, 0]
