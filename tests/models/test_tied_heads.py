"""A head that PEFT ties to a trained embedding has its vocabulary's size, not the embedding's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from laplace_lora import DiagLoraLaplace, LogitsModel
from laplace_lora.generation import score
from support.batches import token_batch
from support.language import text_batch, text_loader
from support.models import TARGETS, VOCABULARY, excite, llama_config
from support.references import assert_near


def tied():
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    kwargs = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **kwargs))
    return excite(model).double().eval()


def test_its_tokens_are_the_vocabulary():
    model, batch = tied(), text_batch()
    la = DiagLoraLaplace(model, "language_modeling", uncovered="diag")
    la.fit(text_loader())
    assert la.model.n_outputs == VOCABULARY
    found = score(la, batch, 3)
    assert_near(found.sequence_map_log_prob, la.model.log_likelihood(batch), 1e-5)


def test_its_rows_are_the_answers():
    model, batch = tied(), token_batch((4, 4))
    answers = [*TARGETS[:2], VOCABULARY - 1]
    wrapped = LogitsModel(model, target_ids=answers)
    logits = model(input_ids=batch["input_ids"]).logits[:, -1]
    assert_near(wrapped(batch), logits[:, answers])
    weight, bias = wrapped.head_tensors()
    assert_near(weight, model.get_input_embeddings().weight[answers])
    assert bias is None
    with pytest.raises(ValueError, match=rf"vocabulary, 0\.\.{VOCABULARY - 1}"):
        LogitsModel(model, target_ids=[1, VOCABULARY])
