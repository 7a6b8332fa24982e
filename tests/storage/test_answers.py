"""A file is for one reading of the model: a `LogitsModel` with other outputs is refused."""

import pytest
import torch

from laplace_lora import KronLoraLaplace, LogitsModel
from support.batches import loader, token_batch
from support.models import TARGETS, peft_model

BATCH = token_batch((4, 2, 5), seed=3)


def read_tokens(out):
    return out.logits[:, 0, :3]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    model, folder = peft_model("llama-lm"), tmp_path_factory.mktemp("answers")
    la = KronLoraLaplace(LogitsModel(model, target_ids=TARGETS), "classification")
    la.fit(loader())
    la.save_pretrained(folder, precision="exact")
    return la, model, folder


@pytest.mark.parametrize("ids", [[13, 7, 11], [3, 4, 5], [3, 4, 5, 6]])
def test_other_answers_are_refused_and_both_are_named(answers, ids):
    _, model, folder = answers
    with pytest.raises(ValueError) as error:
        KronLoraLaplace.from_pretrained(LogitsModel(model, target_ids=ids), folder)
    assert f"target_ids={TARGETS}" in str(error.value)
    assert f"target_ids={ids}" in str(error.value)


def test_the_same_answers_and_the_model_alone_are_accepted(answers):
    la, model, folder = answers
    for given in (LogitsModel(model, target_ids=torch.tensor(TARGETS)), model):
        assert torch.equal(KronLoraLaplace.from_pretrained(given, folder)(BATCH), la(BATCH))


def test_an_output_callable_on_one_side_only_is_refused(answers, tmp_path):
    _, model, folder = answers
    with pytest.raises(ValueError, match=r"with no `output` callable, and .* has one"):
        KronLoraLaplace.from_pretrained(LogitsModel(model, output=read_tokens), folder)
    la = KronLoraLaplace(LogitsModel(model, output=read_tokens), "classification")
    la.fit(loader())
    la.save_pretrained(tmp_path, precision="exact")
    with pytest.raises(ValueError, match=r"with an `output` callable, and .* has none"):
        KronLoraLaplace.from_pretrained(LogitsModel(model, target_ids=TARGETS), tmp_path)
