"""A base model of the same weights and another configuration is pointed out."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from laplace_lora import FunctionalLoraLLLaplace, KronLoraLaplace
from laplace_lora.adapters.model_settings import model_settings
from laplace_lora.storage.same_function import MODEL
from support.batches import loader, token_batch
from support.forgery import forge
from support.models import ARCHITECTURES, PAD, VOCABULARY, excite, peft_model

BATCH = token_batch((4, 2, 5), seed=3)
IDS = {f"{name}_token_id": n for n, name in enumerate(("bos", "eos", "cls", "sep"), 1)}


def llama(**settings):
    kind, config, modules, heads = ARCHITECTURES["llama"]
    return adapted(kind, config(initializer_range=0.5, **settings), modules, heads)


def modern_bert(**settings):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = ModernBertConfig(
        **{"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_attention_heads": 2, **IDS},
        **{"num_labels": 3, "attn_implementation": "eager", **sizes, **settings},
    )
    return adapted(ModernBertForSequenceClassification, config, ["Wqkv"], ["classifier"])


def adapted(kind, config, modules, heads):
    config.num_labels = 3
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=modules, modules_to_save=heads)
    return excite(get_peft_model(kind(config), lora)).double().eval()


def fitted(model):
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    return la


def rope(**settings):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **settings}}


# A model, settings, and what the warning says of them
OTHERS = {
    "theta": (llama, rope(rope_theta=500.0), r"rope_theta is 500.0 and was 10000.0"),
    "scaling": (llama, rope(rope_type="linear", factor=4.0), "rope_type is 'linear' and was"),
    "activation": (llama, {"hidden_act": "gelu"}, "hidden_act is 'gelu' and was 'silu'"),
    "norm": (llama, {"rms_norm_eps": 0.1}, "rms_norm_eps is 0.1 and was 1e-06"),
    "pooling": (modern_bert, {"classifier_pooling": "mean"}, "pooling is 'mean' and was 'cls'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_settings_are_named_at_loading(case, tmp_path):
    make, settings, said = OTHERS[case]
    la = fitted(make())
    la.save_pretrained(tmp_path, precision="exact")
    other = make(**settings)
    assert (other(**BATCH).logits - la.logits_model.model(**BATCH).logits).abs().max() > 1e-5
    with pytest.warns(UserWarning, match=f"configuration differs from .*{said}.* or fit again"):
        KronLoraLaplace.from_pretrained(other, tmp_path)
    assert torch.equal(KronLoraLaplace.from_pretrained(make(), tmp_path)(BATCH), la(BATCH))


def test_files_of_earlier_versions_say_nothing(tmp_path):
    fitted(llama()).save_pretrained(tmp_path)
    forge(tmp_path, **{MODEL: {}})
    KronLoraLaplace.from_pretrained(llama(rms_norm_eps=0.1), tmp_path)


def test_a_merged_posterior_of_other_settings_is_pointed_out():
    la = fitted(llama())
    with pytest.warns(UserWarning, match="rms_norm_eps is 0.1 and was 1e-06"):
        la.merge([fitted(llama(rms_norm_eps=0.1))])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("make", [llama, modern_bert])
def test_what_changes_no_function_is_passed_over(make, tmp_path):
    model = make(use_cache=True)
    model.config.pad_token_id, then = None, model.config.pad_token_id
    before = model_settings(model)
    model.config.pad_token_id = then  # as a trainer does
    la = fitted(model)
    la.save_pretrained(tmp_path)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model(**BATCH)  # transformers notes the kind of problem
    model.eval()
    model.gradient_checkpointing_disable()
    assert model.config.problem_type == "single_label_classification"
    la(BATCH)
    after = model_settings(model)
    assert {name: after[name] for name in before} == before
    again = make(attn_implementation="sdpa", attention_dropout=0.3, id2label=dict(enumerate("xyz")))
    again.config.vocab_size += 14
    again.config.forced_bos_token_id, again.config.suppress_tokens = 5, [1]  # of `generate` alone
    again.config.dtype = torch.bfloat16
    again.config.quantization_config = {"load_in_4bit": True}
    KronLoraLaplace.from_pretrained(again, tmp_path)


def test_a_model_in_another_dtype_is_passed_over(tmp_path):
    la = fitted(llama().float())
    la.save_pretrained(tmp_path / "posterior")
    base = la.logits_model.model.unload().float()
    base.save_pretrained(tmp_path)
    settings = model_settings(base)
    other = type(base).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert model_settings(other) == settings


@pytest.mark.parametrize("is_classifier", [True, False])
def test_padding_tokens_count_where_a_classifier_reads_before_them(is_classifier):
    model = peft_model("llama" if is_classifier else "llama-lm")
    then = model_settings(model)
    model.config.pad_token_id = 5
    assert (model_settings(model) != then) == is_classifier


def test_configurations_within_and_copies_count():
    model = peft_model("t5-lm")
    then = model_settings(model)
    encoder = model.get_base_model().get_encoder()
    assert encoder.config is not model.config
    encoder.config.layer_norm_epsilon = 0.5
    now = model_settings(model)
    changed = [name for name in then if now[name] != then[name]]
    assert changed == ["base_model.model.encoder.layer_norm_epsilon"]
    assert json.loads(json.dumps(now, allow_nan=False)) == now
    model.config.itself = model.config
    assert model_settings(model) == now


def test_a_setting_that_changes_after_a_fit_is_refused():
    model = modern_bert()
    la = fitted(model)
    before = la(BATCH)
    model.config.classifier_pooling = "mean"
    said = r"the base model's settings 'config.classifier_pooling' have changed"
    for use in (lambda: la(BATCH), la.optimize_prior_precision, lambda: la.save_pretrained("x")):
        with pytest.raises(RuntimeError, match=said):
            use()
    model.config.classifier_pooling = "cls"
    assert torch.equal(la(BATCH), before)


def test_a_state_of_other_settings_is_refused():
    la, other = fitted(llama()), KronLoraLaplace(llama(rms_norm_eps=0.1), "classification")
    other.load_state_dict(la.state_dict())
    with pytest.raises(RuntimeError, match=r"settings 'config.rms_norm_eps' have changed"):
        other(BATCH)


def test_a_gaussian_process_asks_for_the_same_settings():
    model = modern_bert()
    la = FunctionalLoraLLLaplace(model, "classification", n_subset=7)
    la.fit(loader())
    la(BATCH)
    model.config.classifier_pooling = "mean"
    with pytest.raises(RuntimeError, match=r"settings or scalings of 'config.classifier_pooling'"):
        la(BATCH)
