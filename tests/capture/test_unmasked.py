"""Padded texts without a mask, or with one of another name, are refused where it matters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertModel

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel
from laplace_lora.generation import generate
from laplace_lora.models.inputs.unmasked import check_is_masked
from support.batches import token_batch
from support.functional import adapters_only, factors_of
from support.language import language_posterior
from support.models import PAD, TARGETS, bert_config, excite, llama_config, peft_model
from support.preferences import pair_batch, reward_posterior

PADDED = "begin or end with the padding token"


def unmasked(batch):
    return {key: value for key, value in batch.items() if key != "attention_mask"}


def unlabelled(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def one_batch(batch):
    return DataLoader([batch], batch_size=None)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_fits_of_kronecker_factors(name, side):
    batch = token_batch((5, 3), side=side)
    la = KronLoraLaplace(peft_model(name), "classification")
    with pytest.raises(ValueError, match=PADDED + ".*would count it"):
        la.fit(one_batch(unmasked(batch)))
    la.fit(one_batch({**batch, "attention_mask": torch.ones_like(batch["input_ids"])}))
    la.fit(one_batch(unmasked(token_batch((5, 5)))))


def test_pairs_are_looked_at_text_by_text():
    la, batch = reward_posterior(fit=False), pair_batch()
    bare = {k: v for k, v in batch.items() if not k.startswith("attention_mask")}
    with pytest.raises(ValueError, match=PADDED):
        la.fit(one_batch(bare))


def test_the_functional_interface():
    model = adapters_only("bert")
    with pytest.raises(ValueError, match=PADDED):
        factors_of(model, "bert", [unmasked(token_batch((5, 3)))])
    whole = unmasked(token_batch((5, 3)))
    ones = torch.ones_like(whole["input_ids"])
    factors_of(model, "bert", [whole], attention_mask=lambda batch: ones)


def test_answers_and_continuations():
    batch = unmasked(token_batch((5, 3)))
    answers = LogitsModel(peft_model("llama-lm"), TARGETS)
    with pytest.raises(ValueError, match=PADDED + ".*answer would be read after it"):
        answers(batch)
    la = language_posterior()
    for prompts in (batch, batch["input_ids"]):
        with pytest.raises(ValueError, match=PADDED + ".*would be continued as text"):
            generate(la, prompts, max_new_tokens=1)


def test_answers_after_padded_prompts_of_a_decoder():
    model = LogitsModel(peft_model("t5-lm"), TARGETS).eval()
    prompts = torch.tensor([[PAD, 5, 6], [PAD, 7, PAD]])  # the padding token begins every text
    batch = {**token_batch((4, 4)), "decoder_input_ids": prompts}
    with pytest.raises(ValueError, match="it is padding: the answer would be read after it"):
        model(batch)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    padded = model({**batch, "decoder_attention_mask": mask})[1]
    alone = {k: v[1:] for k, v in batch.items()} | {"decoder_input_ids": prompts[1:, :2]}
    torch.testing.assert_close(padded, model(alone)[0])


def test_embeddings_with_padding_on_the_left_are_told_positions():
    model, batch = peft_model("llama-lm").eval(), unlabelled(token_batch((4, 2, 5), side="left"))
    embeddings = model.get_base_model().get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    expected = LogitsModel(model, TARGETS).eval()(batch)
    torch.testing.assert_close(LogitsModel(model, TARGETS).eval()(inputs), expected)


def test_a_token_that_also_ends_texts_may_do_so_once():
    config = llama_config()
    config.eos_token_id = [PAD, 3]
    text = torch.tensor([[1, 2, 3, PAD], [1, 2, PAD, 4]])
    check_is_masked({"input_ids": text}, config, "")
    with pytest.raises(ValueError, match=PADDED):
        check_is_masked({"input_ids": torch.tensor([[1, 2, PAD, PAD]])}, config, "")
    check_is_masked({"input_ids": text}, None, "")
    check_is_masked({"input_ids": text, "attention_mask": text != PAD}, config, "")


class Masked(nn.Module):
    """A classifier whose mask has a name of its own."""

    def __init__(self, name):
        super().__init__()
        self.inner, self.name = peft_model("bert"), name

    def forward(self, input_ids, **masks):
        return self.inner(input_ids=input_ids, attention_mask=masks[self.name]).logits


@pytest.mark.parametrize("name", ["mask", "padding_mask", "mask_a"])
def test_masks_of_unclear_names(name):
    batch = token_batch((5, 3))
    batch = {"input_ids": batch["input_ids"] + 1, name: batch["attention_mask"]} | {
        "labels": batch["labels"]
    }
    with pytest.raises(RuntimeError, match=f"'{name}' of the batch may say which tokens"):
        KronLoraLaplace(Masked(name), "classification").fit(one_batch(batch))
    DiagLoraLaplace(Masked(name), "classification").fit(one_batch(batch))


def test_attention_masks_with_a_suffix_are_read():
    def evidence(name):
        batch = token_batch((5, 3, 4))
        batch["input_ids"] += 1  # no padding token tells
        batch[name] = batch.pop("attention_mask")
        la = KronLoraLaplace(Masked(name), "classification")
        la.fit(one_batch(batch))
        return float(la.log_marginal_likelihood())

    assert evidence("attention_mask_a") == pytest.approx(evidence("attention_mask"), rel=1e-9)


def test_a_mask_of_ones_is_one_of_any_name():
    batch = token_batch((4, 4))
    batch["mask"] = batch.pop("attention_mask")
    KronLoraLaplace(Masked("mask"), "classification").fit(one_batch(batch))


class Pooled(nn.Module):
    """A classifier of averages over text that it finds by itself."""

    def __init__(self, start, targets=("query", "value")):
        super().__init__()
        torch.manual_seed(0)
        adapters = LoraConfig(r=2, target_modules=list(targets))
        inner = excite(get_peft_model(BertModel(bert_config(), add_pooling_layer=False), adapters))
        self.inner, self.start, self.head = inner.double().eval(), start, nn.Linear(16, 3)
        self.head.double().requires_grad_(False)

    def forward(self, tokens, lengths=None):
        real = tokens != PAD
        if lengths is not None:
            real = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        states = self.inner(input_ids=tokens, attention_mask=real.long()).last_hidden_state
        if self.start:
            return self.head(states[:, 0])
        return self.head((states * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True))


def bare(lengths, side="right"):
    batch = token_batch(lengths, side=side)
    return {"tokens": batch["input_ids"], "labels": batch["labels"]}


def test_lengths_are_no_masks():
    batch = {**bare((5, 3, 4)), "lengths": torch.tensor([5, 3, 4])}
    with pytest.raises(RuntimeError, match="'lengths' of the batch may say which tokens"):
        KronLoraLaplace(Pooled(start=False), "classification").fit(one_batch(batch))
    DiagLoraLaplace(Pooled(start=False), "classification").fit(one_batch(batch))


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_network_that_makes_its_mask_itself_is_pointed_out_once(side, start):
    la = KronLoraLaplace(Pooled(start and side == "right"), "classification")
    batches = [bare((4, 4)), bare((5, 3, 2), side), bare((5, 3), side)]
    with pytest.warns(UserWarning, match="no output depends on the 0s .* no 'attention_mask'") as w:
        la.fit(DataLoader(batches, batch_size=None))
    assert len(w) == 1
    DiagLoraLaplace(Pooled(start=False), "classification").fit(one_batch(bare((5, 3), side)))


def test_padding_is_found_behind_batches_that_only_look_padded():
    first = bare((4, 4))
    first["tokens"][0, -2:] = 7
    cut = bare((6, 6, 6, 3))
    cut["tokens"][:3, -1] = 3  # most texts are cut, and end with a token of their own
    la = KronLoraLaplace(Pooled(start=False), "classification")
    with pytest.warns(UserWarning, match="no output depends on the 0s"):
        la.fit(DataLoader([first, cut], batch_size=None))


@pytest.mark.parametrize("targets", [["query"], ["query", "value"]])
def test_texts_of_one_length_pass_whatever_they_end_with(targets):
    batch = bare((5, 5, 5))
    batch["tokens"][:, -2:] = 7
    batch["tokens"][0, -3:] = 7
    model = Pooled(True, targets)
    for layer in model.inner.base_model.model.encoder.layer[:1]:
        layer.requires_grad_(False)  # in the last layer the first token's query alone counts
    KronLoraLaplace(model, "classification").fit(one_batch(batch))


def test_the_end_of_a_language_model_s_texts_passes():
    la = language_posterior(fit=False)
    batch = token_batch((6, 6, 6))
    batch["input_ids"][:, -1] = 7
    ids = batch["input_ids"]
    la.fit(one_batch({"input_ids": ids, "labels": ids.clone()}))
