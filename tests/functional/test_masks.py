"""However a model is called, padding enters no factor."""

from collections import UserDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

from laplace_lora import LogitsModel
from laplace_lora.functional import calculate_kronecker_factors, register_hooks
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import token_batch
from support.functional import adapters_only
from support.models import TARGETS, base_model, excite, peft_model
from support.references import assert_near

LENGTHS = (3, 6, 4, 5)
DECODER = (2, 6, 5, 3)


def by_name(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def by_position(model, batch):
    return model(batch["input_ids"], batch["attention_mask"]).logits


def in_order(model, batch):
    return model(*batch)


def in_one(model, batch):
    return LogitsModel(model)(UserDict(batch))


def sums_of_hooks(model, call, batches, keywords=("lora",)):
    activations, output_grads = {}, {}
    with register_hooks(model, activations, output_grads, keywords, None):
        for batch in batches:
            logits = call(model, batch)
            for column in softmax_root(logits.detach()):
                (logits * column).sum().backward(retain_graph=True)
    return [
        side
        for name in (name for name, _ in model.named_modules() if name in activations)
        for side in (activations[name][0] / 4, output_grads[name][0])
    ]


def factors(model, call, batches, keywords=("lora",), **kwargs):
    found = calculate_kronecker_factors(
        model, call, batches, None, target_module_keywords=keywords, **kwargs
    )
    return [side for pair in found.values() for side in pair]


def tuples(batch):
    """A batch in a form in which the library knows no masks."""
    return tuple(batch.values())


def named(call):
    return lambda model, batch: call(model, dict(zip(KEYS, batch, strict=False)))


SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
KEYS = list(token_batch(LENGTHS))


@pytest.mark.parametrize("call", [by_name, by_position, in_one])
def test_masks_may_come_by_name_by_position_or_in_a_batch(call):
    model = adapters_only("bert").eval()
    short, long = (token_batch(LENGTHS, pad_to=pad_to) for pad_to in (6, 12))
    expected = factors(model, by_name, [short])
    assert_near(factors(model, named(call), [tuples(long)]), expected)
    assert_near(sums_of_hooks(model, call, [long]), expected)


def test_hooks_on_a_model_that_takes_batches():
    inner = adapters_only("bert")
    expected = factors(inner, by_name, [token_batch(LENGTHS)])
    model = LogitsModel(inner).eval()
    long = token_batch(LENGTHS, pad_to=12)
    assert_near(sums_of_hooks(model, lambda model, batch: model(batch), [long]), expected)


class Anything(nn.Module):
    """A wrapper whose forward pass hands on whatever it gets."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class TextAndMore(Anything):
    def forward(self, text, *more):
        return self.inner(text, *more)


@pytest.mark.parametrize("kind", [Anything, TextAndMore])
def test_arguments_without_names_are_refused(kind):
    inner = adapters_only("bert").eval()
    model, batch = kind(inner), token_batch(LENGTHS, pad_to=12)
    with pytest.raises(ValueError, match=rf"{kind.__name__} was called with 1 positional"):
        factors(model, named(by_position), [tuples(batch)])
    with (
        register_hooks(model, {}, {}, ["lora"], None),
        pytest.raises(ValueError, match="pass it by name"),
    ):
        by_position(model, batch)
    expected = factors(inner, by_name, [batch])
    assert_near(factors(model, by_position, [batch]), expected)
    read = factors(model, named(by_position), [tuples(batch)], attention_mask=lambda b: b[1])
    assert_near(read, expected)
    if kind is Anything:
        assert_near(factors(model, named(by_name), [tuples(batch)]), expected)
        assert_near(sums_of_hooks(model, by_name, [batch]), expected)


class OfMyOwn(nn.Module):
    """Names the text and its mask as no library does."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.config = model.config

    def forward(self, words, real):
        return self.inner(words, attention_mask=real).logits


class OfBatches(OfMyOwn):
    def forward(self, batch):
        return super().forward(batch[0], batch[1])


def without_wrapper(model, batch):
    return model.get_base_model()(batch[0], attention_mask=batch[1]).logits


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("kind", [OfMyOwn, OfBatches, without_wrapper])
def test_masks_may_reach_the_transformer_only(kind, name):
    inner = adapters_only(name).eval()
    named = [token_batch((3, 6), pad_to=12), token_batch((4, 5), pad_to=9)]
    expected = factors(inner, by_name, named)
    batches = [tuples(batch) for batch in named]
    if kind is without_wrapper:
        assert_near(factors(inner, without_wrapper, batches), expected)
        return
    model = kind(inner)
    call = {OfMyOwn: lambda model, batch: model(*batch[:2])}.get(kind, lambda m, batch: m(batch))
    assert_near(factors(model, call, batches), expected)
    assert_near(sums_of_hooks(model, call, batches), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def deeper(model, batch):
    """Runs a part of the transformer, and a head of its own."""
    states = model.get_base_model().bert(batch[0], attention_mask=batch[1]).last_hidden_state
    return states[:, 0, :3]


def test_a_part_of_the_transformer_says_nothing_of_masks():
    model = adapters_only("bert").eval()
    padded = tuples(token_batch(LENGTHS, pad_to=12))
    with pytest.raises(ValueError, match=r"it is not known which tokens .* pass `attention_mask`"):
        factors(model, deeper, [padded])
    even = token_batch((5, 5))  # no padding, so nothing is unknown
    expected = factors(model, deeper, [tuples(even)], attention_mask=lambda batch: batch[1])
    assert_near(factors(model, deeper, [tuples(even)]), expected)
    cut = [tuple(x[n : n + 1, :length] for x in padded[:2]) for n, length in enumerate(LENGTHS)]
    read = factors(model, deeper, [padded], attention_mask=lambda batch: batch[1])
    assert_near(read, factors(model, deeper, cut))


def test_calls_with_different_masks_are_refused():
    inner = adapters_only("bert").eval()
    first, second = token_batch((3, 5), pad_to=6), token_batch((6, 4), pad_to=6)

    def twice(model, pair):
        return by_position(model, pair[0]) + by_position(model, pair[1])

    unpadded = {**token_batch((6, 6)), "attention_mask": None}
    for pair in ((first, second), (first, unpadded)):
        with pytest.raises(ValueError, match="called several times for a batch, with different"):
            factors(inner, twice, [pair])
    found = factors(inner, twice, [(first, first)])
    assert all(side.isfinite().all() for side in found)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora = nn.Linear(4, 3).double()

    def forward(self, x, mask):
        return (self.lora(x) * mask.unsqueeze(-1)).sum(1)


def test_a_mask_of_another_name_is_refused_where_it_may_be_padding():
    model, x = Recurrent(), torch.randn(2, 5, 4).double()
    real = torch.ones(2, 5).double()
    whole = factors(model, lambda model, batch: model(*batch), [(x, real)])
    assert whole[0].shape == (5, 5)
    padded = real.tril(3)
    assert not torch.equal(padded, real)
    with pytest.raises(ValueError, match="'mask' of the batch may say which tokens"):
        factors(model, lambda model, batch: model(*batch), [(x, padded)])


def test_images_need_no_mask():
    """Of a model for texts and images; a text without a mask has no padding."""
    config = CLIPConfig(
        text_config=CLIPTextConfig(**SMALL, vocab_size=50, projection_dim=8).to_dict(),
        vision_config=CLIPVisionConfig(**SMALL, image_size=8, patch_size=4).to_dict(),
        projection_dim=8,
    )
    model = get_peft_model(CLIPModel(config), LoraConfig(r=2, target_modules=["q_proj"]))

    class Images(OfMyOwn):
        def forward(self, images):
            return self.inner.get_base_model().get_image_features(images).pooler_output[:, :3]

    data = [(torch.randn(2, 3, 8, 8),)]
    found = factors(Images(excite(model)), lambda model, batch: model(batch[0]), data)
    assert len(found) == 4


def bert():
    return BertModel(BertConfig(**SMALL, vocab_size=50), add_pooling_layer=False)


class TwoTexts(nn.Module):
    """Questions and passages, read by an encoder each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.question, self.passage = bert(), bert()
        self.head = nn.Linear(16, 3)
        self.double().eval()

    def forward(self, words, real, others, others_real):
        first = self.question(words, attention_mask=real).last_hidden_state[:, 0]
        second = self.passage(others, attention_mask=others_real).last_hidden_state[:, 0]
        return self.head(torch.cat((first, second), -1))


class Taught(TwoTexts):
    """A student and a frozen teacher, which is called last."""

    def __init__(self):
        super().__init__()
        self.passage.requires_grad_(False)


class NamesTheFirst(TwoTexts):
    def forward(self, input_ids, attention_mask, others, others_real):
        return super().forward(input_ids, attention_mask, others, others_real)


ATTENTION = ("passage.encoder.layer.0.attention.self",)
QUERY_AND_VALUE = ("query", "value", "head")


def two_texts(lengths, other_lengths, **pads):
    first = token_batch(lengths, pad_to=pads.get("pad_to"))
    second = token_batch(other_lengths, pad_to=pads.get("other_pad_to"), seed=3)
    return tuple(batch[key] for batch in (first, second) for key in ("input_ids", "attention_mask"))


def one_by_one(batch):
    """The examples of two texts, without padding."""
    words, real, others, others_real = batch
    return [
        (
            *(x[n : n + 1, : real[n].sum()] for x in (words, real)),
            *(x[n : n + 1, : others_real[n].sum()] for x in (others, others_real)),
        )
        for n in range(len(words))
    ]


@pytest.mark.parametrize("kind", [TwoTexts, Taught, NamesTheFirst])
def test_each_of_several_transformers_has_its_own_mask(kind):
    model = kind()
    keywords = ("question.encoder.layer.0.attention.self",) if kind is Taught else QUERY_AND_VALUE
    for pads in ({}, {"pad_to": 9, "other_pad_to": 7}):
        batch = two_texts(LENGTHS, DECODER, **pads)
        one = one_by_one(batch)
        expected = sums_of_hooks(model, in_order, one, keywords)
        assert_near(factors(model, in_order, one, keywords), expected)
        assert_near(factors(model, in_order, [batch], keywords), expected)
        assert_near(sums_of_hooks(model, in_order, [batch], keywords), expected)


def test_a_batchs_mask_is_not_another_transformers():
    model, batch = TwoTexts(), two_texts(LENGTHS, DECODER)
    expected = factors(model, in_order, [batch], QUERY_AND_VALUE)
    keys = ("input_ids", "attention_mask", "passage", "passage_mask")
    in_one = dict(zip(keys, batch, strict=True))
    found = factors(model, lambda model, b: model(*map(b.get, keys)), [in_one], QUERY_AND_VALUE)
    assert_near(found, expected)


def second_unmasked(model, batch):
    return model(*batch[:3], None)


def test_a_given_mask_is_that_of_all_transformers():
    model, batch = TwoTexts(), two_texts(LENGTHS, LENGTHS)
    read = factors(model, second_unmasked, [batch], ATTENTION, attention_mask=lambda b: b[1])
    masked = factors(model, in_order, [batch], ATTENTION)
    assert_near(read[0], masked[0])  # of embeddings, which attention does not change
    with pytest.raises(ValueError, match="begin or end with the padding token"):
        factors(model, second_unmasked, [batch], ATTENTION)


class Compared(TwoTexts):
    """Has a layer at tokens outside of both."""

    def forward(self, words, real, others, others_real):
        self.passage(others, attention_mask=others_real)
        states = self.question(words, attention_mask=real).last_hidden_state
        return self.head(torch.cat((states, states), -1))[:, 0]


def test_a_layer_outside_of_transformers_that_differ_is_refused():
    model = Compared()
    padded, even = two_texts(LENGTHS, DECODER), two_texts((5, 5), (4, 4))
    for compute in (factors, sums_of_hooks):
        with pytest.raises(ValueError, match="2 transformers were called with different"):
            compute(model, in_order, [padded], ("head",))
    given = factors(model, in_order, [even], ("head",), attention_mask=lambda batch: batch[1])
    assert_near(factors(model, in_order, [even], ("head",)), given)
    read = factors(model, in_order, [padded], ("head",), attention_mask=lambda batch: batch[1])
    assert_near(read, factors(model, in_order, one_by_one(padded), ("head",)))


class TextAndImage(nn.Module):
    def __init__(self, image_first):
        super().__init__()
        torch.manual_seed(0)
        config = ViTConfig(**SMALL, image_size=4, patch_size=2)
        self.text, self.image = bert(), ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(16, 3)
        self.image_first = image_first
        self.double().eval()

    def forward(self, words, real, images):
        image = self.image(images).last_hidden_state[:, 0] if self.image_first else None
        text = self.text(words, attention_mask=real).last_hidden_state[:, 0]
        image = self.image(images).last_hidden_state[:, 0] if image is None else image
        return self.head(torch.cat((text, image), -1))


class NamedTextAndImage(TextAndImage):
    def forward(self, input_ids, attention_mask, pixel_values):
        return super().forward(input_ids, attention_mask, pixel_values)


@pytest.mark.parametrize("kind", [TextAndImage, NamedTextAndImage])
@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("pad_to", [5, 6, 9])  # an image has five tokens
def test_a_texts_mask_is_not_that_of_images(kind, image_first, pad_to):
    model = kind(image_first)
    text = token_batch((3, 5, 4, 5), pad_to=pad_to)
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    batch = (text["input_ids"], text["attention_mask"], images)
    one = [
        (ids[None, : real.sum()], real[None, : real.sum()], image[None])
        for ids, real, image in zip(*batch, strict=True)
    ]
    keywords = ("query", "q_proj", "value", "fc1", "head")
    expected = sums_of_hooks(model, in_order, one, keywords)
    assert_near(factors(model, in_order, [batch], keywords), expected)
    assert_near(sums_of_hooks(model, in_order, [batch], keywords), expected)
    given = factors(model, in_order, [batch], keywords, attention_mask=lambda batch: batch[1])
    assert_near(given, expected)


def test_gradients_have_the_mask_of_their_own_call():
    model = adapters_only("bert").eval()
    batches = [token_batch((3, 6), pad_to=6), token_batch((4, 5), pad_to=6, seed=1)]
    activations, output_grads = {}, {}
    with register_hooks(model, activations, output_grads, ["lora"], None):
        logits = [by_name(model, batch) for batch in batches]
        for f in logits:
            for column in softmax_root(f.detach()):
                (f * column).sum().backward(retain_graph=True)
    found = [s for n in activations for s in (activations[n][0] / 4, output_grads[n][0])]
    assert_near(found, sums_of_hooks(model, by_name, batches))


def lacks_embeddings(self):
    return self.of_another_name


def breaks(self):
    raise KeyError("embeddings")


def test_hooks_are_removed_if_they_cannot_be_registered(monkeypatch):
    model = adapters_only("bert").eval()
    base = type(model.get_base_model())
    monkeypatch.setattr(base, "get_input_embeddings", breaks)
    with pytest.raises(KeyError, match="embeddings"):
        register_hooks(model, {}, {}, ["lora"], None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    monkeypatch.setattr(base, "get_input_embeddings", lacks_embeddings)
    with register_hooks(model, {}, {}, ["lora"], None) as hooks:
        assert hooks


def encoder_decoder(task_type=None):
    config = LoraConfig(r=2, target_modules=["q", "v"], task_type=task_type)
    return excite(get_peft_model(base_model("t5-lm"), config)).double().eval()


def texts(encoder_pad, decoder_pad, decoder=DECODER):
    text = token_batch(decoder, pad_to=decoder_pad, seed=3)
    return {
        **token_batch(LENGTHS, pad_to=encoder_pad),
        "decoder_input_ids": text["input_ids"],
        "decoder_attention_mask": text["attention_mask"],
    }


def without_padding(n):
    """One example of the texts, without its padding."""
    lengths = {"input_ids": LENGTHS[n], "attention_mask": LENGTHS[n]}
    lengths |= {f"decoder_{key}": DECODER[n] for key in lengths}
    batch = texts(None, None)
    return {key: batch[key][n : n + 1, :length] for key, length in lengths.items()}


def first_step(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs).logits[:, 0, TARGETS]


def first_step_by_position(model, batch):
    encoder, decoder = ("input_ids", "attention_mask"), ("decoder_input_ids",)
    inputs = [batch[key] for key in (*encoder, *decoder, "decoder_attention_mask")]
    return model(*inputs).logits[:, 0, TARGETS]


def encoded_before(model, batch):
    outputs = model.get_encoder()(batch["input_ids"], batch["attention_mask"])
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "input_ids")}
    return model(encoder_outputs=outputs, **inputs).logits[:, 0, TARGETS]


@pytest.mark.parametrize("call", [first_step, first_step_by_position, encoded_before])
def test_both_texts_of_an_encoder_decoder_may_be_padded(call):
    model = encoder_decoder()
    one = [without_padding(n) for n in range(4)]
    expected = factors(model, first_step, one)
    for pads in ((6, 6), (9, 9), (6, 8)):
        batch = texts(*pads)
        assert_near(factors(model, call, [batch]), expected)
        if call is not encoded_before:  # hooks learn the masks from the model's own call
            assert_near(sums_of_hooks(model, call, [batch]), expected)
        read = factors(
            model,
            lambda model, pair: call(model, pair[0]),
            [(batch, batch["labels"])],
            attention_mask=lambda pair: pair[0]["attention_mask"],
        )
        assert_near(read, expected)


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("encoder_pad", [6, 9])
def test_all_of_a_decoders_text_made_of_labels_is_real(encoder_pad, task_type):
    model = encoder_decoder(task_type)
    batch = token_batch(LENGTHS, pad_to=encoder_pad)
    batch["labels"] = token_batch((6, 6, 6, 6), seed=3)["input_ids"]

    def call(model, batch):
        return model(**batch).logits[:, 0, TARGETS]

    base = model.get_base_model()
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    given["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
    given["decoder_attention_mask"] = torch.ones_like(given["decoder_input_ids"])
    expected = factors(model, first_step, [given])
    assert_near(factors(model, call, [batch]), expected)
    assert_near(sums_of_hooks(model, call, [batch]), expected)


def test_hooks_leave_nothing_behind():
    model = peft_model("t5-lm").eval()
    with register_hooks(model, {}, {}, ["lora"], None):
        first_step(model, texts(6, 6))
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
