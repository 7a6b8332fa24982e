"""BigBird's block-sparse attention stays what it is, and batches too short for it are refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    BigBirdConfig,
    BigBirdForSequenceClassification,
    BigBirdPegasusConfig,
    BigBirdPegasusForSequenceClassification,
)

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.models.changes.modes import evaluation_mode
from support.batches import token_batch
from support.models import excite

LONG, SHORT = token_batch((30, 29, 30), pad_to=30), token_batch((6, 6, 6), seed=1)
BLOCKS = {"block_size": 2, "num_random_blocks": 1, "vocab_size": 50, "num_labels": 3}
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")


def big_bird(**settings):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = BigBirdConfig(**BLOCKS, **sizes, num_hidden_layers=1, **settings)
    torch.manual_seed(0)
    model = BigBirdForSequenceClassification(config)
    adapters = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return excite(get_peft_model(model, adapters)).double().eval()


def fitted(model, *batches, kind=DiagLoraLaplace):
    la = kind(model, "classification")
    la.fit(DataLoader(batches, batch_size=None))
    return la


@pytest.mark.parametrize("kind", [DiagLoraLaplace, KronLoraLaplace])
def test_a_short_batch_is_refused_and_changes_nothing(kind):
    la = fitted(big_bird(), LONG, kind=kind)
    before = la(LONG)
    for run in (lambda: la(SHORT), lambda: fitted(la.logits_model.model, LONG, SHORT)):
        with pytest.raises(ValueError, match=r"too few tokens .* attention_type='original_full'"):
            run()
    assert torch.equal(la(LONG), before)
    assert la.logits_model.model.get_base_model().bert.attention_type == "block_sparse"


def test_full_attention_does_not_depend_on_the_order_of_batches():
    one, other = (
        fitted(big_bird(attention_type="original_full"), *batches).log_marginal_likelihood()
        for batches in ((LONG, SHORT), (SHORT, LONG))
    )
    torch.testing.assert_close(one, other)


def test_short_texts_in_long_batches_are_fitted():
    batch = token_batch((30, 6, 29), pad_to=30)
    assert fitted(big_bird(), batch, kind=KronLoraLaplace).n_data == 3


def test_a_model_that_has_changed_its_attention_since_the_fit_is_refused(tmp_path):
    la = fitted(big_bird(), LONG)
    la.logits_model.model(**SHORT)
    with pytest.raises(RuntimeError, match=r"settings 'config.attention_type' have changed"):
        la(LONG)
    fitted(la.logits_model.model, LONG, SHORT).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="attention_type is 'block_sparse' and was 'original_full'"
    ):
        DiagLoraLaplace.from_pretrained(big_bird(), tmp_path)


def test_the_kinds_of_attention_can_be_changed_afterwards():
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
    config = BigBirdPegasusConfig(**BLOCKS, **sizes, **layers, decoder_ffn_dim=24, eos_token_id=1)
    model = BigBirdPegasusForSequenceClassification(config).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    with evaluation_mode(model), pytest.raises(ValueError, match="too few tokens"):
        model(input_ids=ids)
    assert model(input_ids=ids).logits.isfinite().all()
    assert model.model.encoder.attention_type == "original_full"
