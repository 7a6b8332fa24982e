"""What users give by mistake is named, with what to give instead; what is close enough is taken."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import FullLoraLaplace, KronLoraLaplace
from laplace_lora.evaluation import MAP, evaluate
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import LOW, posterior
from support.references import assert_near
from support.texts import word_tokenizer
from support.tokens import tagged_posterior

BATCH = token_batch((4, 2, 5), seed=3)


class Pipeline:
    """Holds a model, and is none."""


@pytest.mark.parametrize("thing", [Pipeline(), "my-adapter"])
def test_models_that_are_none(thing):
    for make in (lambda: KronLoraLaplace(thing, "classification"), lambda: MAP(thing)):
        with pytest.raises(TypeError, match=f"another torch module, got {type(thing).__name__}"):
            make()


@pytest.mark.parametrize("thing", [Pipeline(), "bert"])
def test_tokenizers_that_are_none(thing):
    la = posterior(name="bert", **LOW)
    with pytest.raises(
        TypeError, match=f"must be the model's tokenizer, got {type(thing).__name__}"
    ):
        la.predict(["a b", "c"], thing)


def test_models_are_not_evaluated_as_they_are():
    model = peft_model("bert")
    with pytest.raises(TypeError, match=r"predict is a model \(PeftModel.*evaluate MAP"):
        evaluate(model, loader())


def test_arrays_are_probabilities_too():
    la = posterior(name="bert", **LOW)
    expected = evaluate(la, loader(), bootstrap=2)
    found = evaluate(lambda batch: la(batch).numpy(), loader(), bootstrap=2)
    assert torch.equal(found.probs, expected.probs)


def test_folders_that_are_not_there():
    with pytest.raises(FileNotFoundError, match="neither a folder nor the name of a repository"):
        KronLoraLaplace.from_pretrained(peft_model("bert"), "./nowhere")


def test_rows_may_have_their_text_beside_the_tokens():
    la, tokenizer = posterior(name="bert", **LOW), word_tokenizer()
    texts = ["a b c", "c", "b b"]
    rows = [{**tokenizer(text), "text": text, "words": text.split()} for text in texts]
    expected = la.predict(texts, tokenizer).probs
    assert torch.equal(la.predict(rows, tokenizer).probs, expected)
    columns = [{k: v for k, v in row.items() if k != "words"} for row in rows]
    data = Dataset.from_list(columns).with_format("torch")
    assert torch.equal(la.predict(data, tokenizer).probs, expected)


def test_words_are_no_texts_of_a_token_classifier():
    la = tagged_posterior()
    for words in ([["a", "b"], ["c", "d"]], [["a", "b", "c"], ["c"]]):
        with pytest.raises(TypeError, match="is_split_into_words=True"):
            la.predict(words, word_tokenizer())


class Trained(nn.Module):
    """A module as the `Trainer` takes it: a dictionary with the loss and the logits."""

    def __init__(self):
        super().__init__()
        self.inner = peft_model("bert")

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"loss": None, "logits": self.inner(input_ids, attention_mask).logits}


def test_dictionaries_with_logits_are_read():
    la, expected = (KronLoraLaplace(m, "classification") for m in (Trained(), peft_model("bert")))
    for each in (la, expected):
        each.fit(loader())
    assert_near(la(BATCH), expected(BATCH))


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace])
def test_decoders_without_a_padding_token_classify_one_text_at_a_time(cls):
    def fitted(pad):
        model = peft_model("llama")
        model.config.pad_token_id = model.get_base_model().config.pad_token_id = pad
        la = cls(model, "classification")
        rows = [token_batch((length,), seed=length) for length in (3, 5, 4)]
        la.fit(DataLoader(rows, batch_size=None))
        return float(la.log_marginal_likelihood())

    assert fitted(None) == pytest.approx(fitted(0), rel=1e-9)
