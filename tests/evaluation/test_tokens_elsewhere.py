"""Which tokens of out-of-distribution texts are told apart from the data's: those with a label."""

from functools import partial

import pytest
import torch

from laplace_lora.evaluation import (
    MAP,
    LoraEnsemble,
    MCDropout,
    TemperatureScaling,
    TrainingFreeBayes,
    evaluate,
)
from laplace_lora.likelihoods.language_modeling import IGNORED
from support.tokens import tagged_batch, tagged_loader, tagged_posterior, tagger

BATCH = tagged_batch((6, 8, 5, 9), seed=3)
LABELLED = BATCH["labels"] != IGNORED
OF_LABELLED = int(LABELLED.sum())
OF_ALL = int(BATCH["attention_mask"].sum())


def without_labels(batch=BATCH):
    return {name: value for name, value in batch.items() if name != "labels"}


def relabelled(labels):
    return {**BATCH, "labels": labels}


def ensemble(model):
    model = tagger()
    model.add_adapter("other", model.peft_config["default"])
    return LoraEnsemble(model)


@pytest.fixture(scope="module")
def model():
    return tagger(lora_dropout=0.1)


@pytest.fixture(scope="module")
def la(model):
    return tagged_posterior(model=model)


@pytest.mark.parametrize(
    "make",
    [
        MAP,
        MCDropout,
        partial(TemperatureScaling, val_loader=[BATCH]),
        partial(TrainingFreeBayes, anchor_loader=[BATCH], n_samples=2),
        ensemble,
    ],
)
def test_texts_are_not_told_apart_from_themselves(model, make):
    report = evaluate(make(model), [BATCH], ood_loader=[BATCH], bootstrap=2)
    assert report["OOD AUROC"] == 0.5
    assert torch.equal(report.ood_uncertainty, report.uncertainty)


def test_nor_by_mutual_information(la):
    for size in (1, 3):
        data = tagged_loader(size, BATCH)
        report = evaluate(la.predict, data, ood_loader=data, bootstrap=2)
        assert report["OOD AUROC"] == report["OOD AUROC (MI)"] == 0.5
        assert len(report.ood_uncertainty) == OF_LABELLED


@pytest.mark.parametrize("marks", [[True, True], [True, False], [False, True]])
def test_fillings_of_several_widths_are_no_labels(model, marks):
    """A batch's padding is not taken for tokens that have a label."""
    narrow, wide = tagged_batch((4, 3), seed=1), tagged_batch((9, 7), seed=2)
    elsewhere = [
        {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        if is_filled
        else without_labels(batch)
        for batch, is_filled in zip((narrow, wide), marks, strict=True)
    ]
    with pytest.warns(UserWarning, match="no labels of their tokens"):
        report = evaluate(MAP(model), [BATCH], ood_loader=elsewhere, bootstrap=2)
    assert len(report.ood_uncertainty) == 23


def test_names_of_texts_are_no_labels_of_tokens(model):
    named = {**BATCH, "labels": ["x", "y", "z", "x"]}
    with pytest.warns(UserWarning, match="no labels of their tokens"):
        report = evaluate(MAP(model), [BATCH], ood_loader=[named], bootstrap=2)
    assert len(report.ood_uncertainty) == OF_ALL


def test_values_of_labels_do_not_count_and_their_key_does(model):
    """Texts of another kind may have other classes."""
    plain = evaluate(MAP(model), [BATCH], ood_loader=[BATCH], bootstrap=2)
    other = torch.where(LABELLED, 90, IGNORED)
    for elsewhere in (relabelled(other), (without_labels(), other)):
        report = evaluate(MAP(model), [BATCH], ood_loader=[elsewhere], bootstrap=2)
        assert report.values == plain.values
    named = {**without_labels(), "tags": BATCH["labels"]}
    report = evaluate(MAP(model), [named], ood_loader=[named], label_key="tags", bootstrap=2)
    assert report.values == plain.values


@pytest.mark.parametrize(
    "elsewhere",
    [
        without_labels(),
        relabelled(None),
        relabelled(torch.zeros(4, dtype=torch.long)),
        relabelled(torch.full_like(BATCH["labels"], IGNORED)),
    ],
    ids=["none", "None", "one each", "filling"],
)
def test_all_tokens_of_unlabelled_texts_count_with_a_warning(model, elsewhere):
    with pytest.warns(UserWarning, match=r"labels of -100 where a token is not to count"):
        report = evaluate(MAP(model), [BATCH], ood_loader=[elsewhere], bootstrap=2)
    assert len(report.ood_uncertainty) == OF_ALL


def test_a_text_without_a_label_counts_no_token_beside_labelled_ones(model):
    labels = BATCH["labels"].clone()
    labels[0] = IGNORED
    for size in (1, 4):
        loader = tagged_loader(size, relabelled(labels))
        report = evaluate(MAP(model), [BATCH], ood_loader=loader, bootstrap=2)
        assert len(report.ood_uncertainty) == int(LABELLED[1:].sum())


def test_some_batches_may_have_no_labels(model):
    with pytest.warns(UserWarning, match="out-of-distribution texts have no labels"):
        batches = [BATCH, without_labels()]
        report = evaluate(MAP(model), [BATCH], ood_loader=batches, bootstrap=2)
    assert len(report.ood_uncertainty) == OF_LABELLED + OF_ALL


def test_texts_of_nothing_but_padding_are_refused(model):
    def nothing(batch):
        return torch.zeros(*batch["input_ids"].shape, 3)

    def mapped(batch):
        return nothing(batch) if "empty" in batch else MAP(model)(batch)

    with pytest.raises(ValueError, match="no token"):
        evaluate(mapped, [BATCH], ood_loader=[{**BATCH, "empty": True}], bootstrap=2)
