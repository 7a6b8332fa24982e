"""Where padding changes a model's answers, the first batch of every kind of fit says so."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForQuestionAnswering,
    FunnelConfig,
    FunnelForTokenClassification,
)

from laplace_lora import DiagLoraLaplace, KronLoraLLLaplace, LogitsModel
from laplace_lora.capture.padding_verification import is_padded, verify_padding
from laplace_lora.models.inputs.positions import real_positions
from support.architectures import TEXT, architecture
from support.batches import token_batch
from support.models import excite, peft_model
from support.preferences import pair_batch
from support.spans import question_batch, reader
from support.tokens import tagged_batch, tagger

PADDED = "begin or end with the padding token"
LENGTHS = (4, 6, 3)


def adapted(base, modules, task):
    lora = LoraConfig(r=2, target_modules=modules, task_type=task)
    return excite(get_peft_model(base, lora)).double()


def bart_reader():
    torch.manual_seed(0)
    sizes = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"}
    return adapted(BartForQuestionAnswering(BartConfig(**sizes)), ["q_proj"], "QUESTION_ANS")


def funnel_tagger():
    torch.manual_seed(0)
    sizes = {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8, "d_inner": 24}
    config = FunnelConfig(vocab_size=50, d_model=16, n_head=2, num_labels=3, **sizes)
    return adapted(FunnelForTokenClassification(config), ["q_head"], "TOKEN_CLS")


def choosing():
    return architecture("choice", "bert", TEXT)


def choices(lengths=(6, 4, 5, 3, 6, 6), side="right"):
    """Three choices of each of two questions; no column is padding in all of a question's."""
    batch = token_batch(lengths, side=side)
    stacked = {key: batch[key].view(2, 3, -1) for key in ("input_ids", "attention_mask")}
    return {**stacked, "labels": torch.tensor([2, 0])}


def pairs(side="right"):
    """The rejected texts are all of one length."""
    return pair_batch((3, 6), (4, 4), side=side)


def tokens(side="right"):
    return tagged_batch(LENGTHS, side=side)


def rewarding(name="bert"):
    return peft_model(name, num_labels=1)


KINDS = {
    "tokens": (tagger, "token_classification", tokens),
    "spans": (reader, "question_answering", question_batch),
    "choices": (choosing, "classification", choices),
    "pairs": (rewarding, "reward_modeling", pairs),
    "classes": (
        lambda: peft_model("bert"),
        "classification",
        lambda **kw: token_batch((4, 3), **kw),
    ),
    "encoder-decoder": (bart_reader, "question_answering", question_batch),
}


def fit(model, likelihood, batch, cls=DiagLoraLaplace):
    torch.manual_seed(0)
    la = cls(model, likelihood, uncovered="diag")
    la.fit(DataLoader([batch], batch_size=None))
    return la


def warned(*arguments, **kwargs):
    """How often a fit warns of padding; other warnings are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.filterwarnings("always", message="the model itself answers a padded text")
        fit(*arguments, **kwargs)
    return len(caught)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_before_a_text_is_pointed_out_once(kind):
    make, likelihood, batch = KINDS[kind]
    assert warned(make(), likelihood, batch(side="left")) == 1
    assert warned(make(), likelihood, batch()) == 0


def test_padding_on_either_side_may_count():
    for side in ("left", "right"):
        assert warned(funnel_tagger(), "token_classification", tokens(side)) == 1
    whole = tagged_batch((4, 4))
    assert warned(funnel_tagger(), "token_classification", whole) == 0


def test_what_knows_its_positions_is_left_in_peace():
    left = tokens("left")
    assert warned(tagger("llama"), "token_classification", left) == 0
    assert warned(reader("llama"), "question_answering", question_batch(side="left")) == 0
    told = {**left, "position_ids": real_positions(left["attention_mask"])}
    assert warned(tagger("bert"), "token_classification", told) == 0


@torch.no_grad()
def test_choices_may_share_their_positions():
    model = LogitsModel(choosing()).eval()
    one = {key: value[:1] for key, value in choices().items()}
    one["position_ids"] = torch.arange(6).unsqueeze(0)
    assert is_padded(one, model.config)
    verify_padding(model.own_logits, one, model(one), torch.float64, model.config)


def test_last_layers_are_verified_as_well():
    left = token_batch((4, 3), side="left")
    assert warned(peft_model("bert"), "classification", left, KronLoraLLLaplace) == 1
    assert warned(peft_model("llama"), "classification", left, KronLoraLLLaplace) == 0


def test_a_text_that_is_padded_to_the_batch_alone_shows_it():
    """The first text has no padding, and where rows are tokens it is the one that is compared."""
    batch = tagged_batch((6, 3), side="left")
    assert batch["attention_mask"][0].all()
    assert warned(tagger(), "token_classification", batch) == 1


def test_one_pass_is_added():
    model, batch, calls = tagger().eval(), tagged_batch(side="left"), []
    model.register_forward_hook(lambda *args: calls.append(1))
    single = {key: value[:1] for key, value in batch.items()}

    def own(text):
        calls.append(text["input_ids"].shape)
        return torch.zeros(3, 3)

    assert is_padded(single, None)
    verify_padding(own, single, torch.zeros(3, 3), torch.float64, None)
    assert calls == [(1, 4)]


def unmasked(batch):
    return {key: value for key, value in batch.items() if "mask" not in key}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_without_a_mask_is_refused_where_it_counts(kind, side):
    make, likelihood, batch = KINDS[kind]
    with pytest.raises(ValueError, match=PADDED + ".*the model reads it as text"):
        fit(make(), likelihood, unmasked(batch(side=side)))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_texts_need_no_mask(kind):
    make, likelihood, batch = KINDS[kind]
    whole = unmasked(batch(side="right"))
    whole = {
        k: v.masked_fill(v == 0, 9) if k.startswith("input_ids") else v for k, v in whole.items()
    }
    fit(make(), likelihood, whole)


@pytest.mark.parametrize("cls", [DiagLoraLaplace, KronLoraLLLaplace])
@pytest.mark.parametrize("kind", ["classes", "pairs"])
def test_decoders_that_find_a_texts_end_themselves_need_no_mask(kind, cls):
    _, likelihood, batch = KINDS[kind]
    model = peft_model("llama", num_labels=1 if kind == "pairs" else 3)
    bare, masked = (fit(model, likelihood, b, cls) for b in (unmasked(batch()), batch()))
    torch.testing.assert_close(bare.log_marginal_likelihood(), masked.log_marginal_likelihood())
    with pytest.raises(ValueError, match=PADDED):
        fit(model, likelihood, unmasked(batch(side="left")), cls)


def test_bare_ids_of_a_last_layer_are_looked_at():
    ids = token_batch((4, 3))["input_ids"]
    la = KronLoraLLLaplace(peft_model("bert"), "classification")
    with pytest.raises(ValueError, match=PADDED):
        la.fit(DataLoader([(ids, torch.tensor([0, 1]))], batch_size=None))


@pytest.mark.parametrize(("end", "refuses"), [(None, True), (0, False)])
def test_a_padding_token_that_ends_texts_may_do_so_once(end, refuses):
    model = peft_model("bert")
    model.get_base_model().config.eos_token_id = end
    batch = unmasked(token_batch((4, 3)))
    with pytest.raises(ValueError, match=PADDED) if refuses else nullcontext():
        fit(model, "classification", batch)
