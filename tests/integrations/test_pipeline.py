"""The pipeline's dictionaries are those of `predict`, for one text and for many."""

import copy

import pytest
import torch
from transformers import PreTrainedTokenizerFast, pipeline

from laplace_lora import KronLoraLaplace
from laplace_lora.integrations.pipeline import LaplacePipeline, _answers
from support.batches import loader
from support.models import TARGETS, peft_model
from support.texts import byte_tokenizer, special_tokenizer, word_tokenizer

TEXTS = ["a b c", "d e", "f g h a b", "c"]


@pytest.fixture(scope="module")
def la():
    model = peft_model("bert").float()
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    la = KronLoraLaplace(model, "classification", prior_precision=5.0)
    la.fit(loader())
    return la


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def test_dictionaries_are_those_of_predict(la, tokenizer):
    found = la.predict(TEXTS, tokenizer)
    answers = LaplacePipeline(la, tokenizer)(TEXTS)
    for n, answer in enumerate(answers):
        assert answer["label"] == ("bad", "fair", "good")[int(found.probs[n].argmax())]
        assert answer["score"] == pytest.approx(float(found.probs[n].max()), abs=1e-6)
        assert answer["entropy"] == pytest.approx(float(found.entropy[n]), abs=1e-6)
        doubt = float(found.mutual_information[n])
        assert answer["mutual_information"] == pytest.approx(doubt, abs=1e-6)


def test_batches_and_all_classes(la, tokenizer):
    classify = pipeline(
        "text-classification",
        model=la.logits_model.model,
        tokenizer=tokenizer,
        pipeline_class=LaplacePipeline,
        posterior=la,
        batch_size=3,
    )
    found = la.predict(TEXTS, tokenizer)
    answers = classify(TEXTS, top_k=None)
    for n, classes in enumerate(answers):
        assert [each["score"] for each in classes] == sorted(
            (each["score"] for each in classes), reverse=True
        )
        assert sum(each["score"] for each in classes) == pytest.approx(1, abs=1e-5)
        assert classes[0]["score"] == pytest.approx(float(found.probs[n].max()), abs=1e-5)
    assert len(classify("a b", top_k=2)) == 2
    assert isinstance(classify("a b"), list)


@pytest.mark.parametrize("name", ["num_beams", "do_sample", "link_approx", "n_samples"])
def test_options_without_effect_are_refused(la, tokenizer, name):
    with pytest.raises(ValueError, match=f"{name} would have no effect"):
        LaplacePipeline(la, tokenizer)("a b", **{name: 4})
    with pytest.raises(ValueError, match=f"{name} would have no effect"):
        LaplacePipeline(la, tokenizer, **{name: 4})
    cut = LaplacePipeline(la, tokenizer)("a b c", truncation=True, max_length=2)
    assert cut == LaplacePipeline(la, tokenizer)("a b")


class Passing(PreTrainedTokenizerFast):
    """A tokenizer that names none of its arguments."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_tokenizer_need_not_name_its_arguments(la, tokenizer):
    passing = copy.deepcopy(tokenizer)
    passing.__class__ = Passing
    cut = {"truncation": True, "max_length": 2}
    found = LaplacePipeline(la, passing)("a b c", **cut)
    assert found == LaplacePipeline(la, tokenizer)("a b")
    with pytest.raises(ValueError, match="num_beams would have no effect"):
        LaplacePipeline(la, passing)("a b", num_beams=2)


def test_a_text_of_a_chat_template_begins_once(la):
    classify = LaplacePipeline(la, special_tokenizer())
    once, twice = classify(["h a b", "h h a b"])
    assert once == classify("a b")[0] != twice
    expected = la.predict(["h a b"], special_tokenizer()).probs.max()
    assert once["score"] == pytest.approx(float(expected), abs=1e-6)


def test_the_answers_of_a_decoder_are_its_labels(tokenizer):
    la = KronLoraLaplace(peft_model("llama-lm").float(), "classification", target_ids=[2, 4, 6])
    la.fit(loader())
    (answer,) = LaplacePipeline(la, tokenizer)("a b c")
    assert answer["label"] in "ace"
    assert TARGETS and la.logits_model.target_ids.tolist() == [2, 4, 6]


def test_truncation_leaves_a_question_its_end(la, tokenizer):
    """An answer stands behind its question, so a cut end is another question."""
    decoder = KronLoraLaplace(
        peft_model("llama-lm").float(), "classification", target_ids=[2, 4, 6]
    )
    decoder.fit(loader())
    tokenizer = copy.deepcopy(tokenizer)
    classify = LaplacePipeline(decoder, tokenizer, truncation=True, max_length=3)
    assert classify("a b c", padding="max_length") == LaplacePipeline(decoder, tokenizer)("a b c")
    with pytest.raises(ValueError, match="cut the end of a text with 4 tokens"):
        classify("a b c d")
    tokenizer.truncation_side = "left"
    assert classify("a b c d") == classify("b c d")
    whole = LaplacePipeline(la, tokenizer, truncation=True, max_length=3)
    assert whole("a b c d") == whole("b c d")  # a classifier has no end that counts


def test_no_two_answers_have_one_name():
    words = byte_tokenizer()
    tokens = words.convert_tokens_to_ids(["a", "b", "Ġ", "Ċ", "Ã", "Â"])
    assert [words.decode([token]) for token in tokens] == ["a", "b", " ", "\n", "�", "�"]
    labels = _answers(tokens, words)
    assert labels == ["a", "b", " ", "\n", "Ã", "Â"]
    words.add_tokens([" a"])
    spaced = _answers(words.convert_tokens_to_ids(["a", " a", "b"]), words)
    assert spaced == ["a", " a", "b"]
    model = KronLoraLaplace(peft_model("llama-lm").float(), "classification", target_ids=[2, 4, 6])
    model.fit(loader())
    tokenizer = word_tokenizer()
    tokenizer.decode = lambda ids: {2: "yes", 4: " yes", 6: " no"}[ids[0]]
    found = LaplacePipeline(model, tokenizer)("a b", top_k=None)
    assert {each["label"] for each in found} == {"yes", " yes", "no"}


def test_what_does_not_fit_is_refused(la, tokenizer):
    with pytest.raises(ValueError, match="the model that the posterior is of"):
        LaplacePipeline(la, tokenizer, model=peft_model("bert"))
    with pytest.raises(TypeError, match=r"is made of a fitted posterior, .*got PeftModel"):
        LaplacePipeline(la.logits_model.model, tokenizer)
    with pytest.raises(ValueError, match="probabilities already"):
        LaplacePipeline(la, tokenizer)("a b", function_to_apply="sigmoid")
    regression = KronLoraLaplace(peft_model("bert"), "regression")
    with pytest.raises(ValueError, match="likelihood='classification'"):
        LaplacePipeline(regression, tokenizer)


def test_the_model_is_left_as_it_was(la, tokenizer):
    model = la.logits_model.model
    before = [parameter.clone() for parameter in model.parameters()]
    LaplacePipeline(la, tokenizer)(TEXTS)
    assert all(map(torch.equal, before, model.parameters()))
