"""Posteriors of language models: collated texts, files, refusals."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from laplace_lora import KronLoraLaplace, KronLoraLLLaplace, LogitsModel
from laplace_lora.likelihoods import language_modeling as likelihoods_module
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.models.token_model import TokenModel
from laplace_lora.predictive.glm import Predictor
from support.language import EXACT, language_posterior, text_batch, text_loader
from support.models import VOCABULARY, peft_model

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def test_collated_texts_fit_tune_and_come_back_from_a_file(tmp_path):
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    examples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)}
        for ids in ([5, 6, 7, 8], [9, 5], [6, 7, 4, 3, 2])
    ]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = DataLoader(examples, batch_size=2, collate_fn=collate)
    la = language_posterior(fit=False)
    torch.manual_seed(0)
    la.fit(data)
    scored = sum(len(example["input_ids"]) - 1 for example in examples)
    with torch.no_grad():
        nll = sum(-_log_likelihood(la, example["input_ids"]) for example in examples)
    assert la.loss == pytest.approx(nll.item(), rel=1e-6) and scored == 8
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(n_steps=10)
    assert la.log_marginal_likelihood() > before
    la.optimize_prior_precision(prior_structure="layerwise", correction=False)
    assert la.log_marginal_likelihood() > before
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.model.model, tmp_path)
    assert isinstance(again.model, TokenModel) and again.likelihood == "language_modeling"
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    other = language_posterior(fit=False)
    other.load_state_dict(la.state_dict())
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert la.estimate_memory(next(iter(data))).jacobian < 2**20


def _log_likelihood(la, ids):
    logits = la.model.model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum()


def test_half_precision_is_summed_in_single():
    la = language_posterior(dtype=torch.bfloat16)
    assert la.model(text_batch()).dtype == torch.float32
    reference = language_posterior(dtype=torch.float32)
    assert la.loss == pytest.approx(reference.loss, rel=0.05)


def test_what_makes_no_sense_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="target_ids"):
        language_posterior(fit=False, target_ids=[3, 4])
    with pytest.raises(ValueError, match="takes the PeftModel"):
        KronLoraLaplace(LogitsModel(peft_model("llama-lm"), [3, 4]), "language_modeling")
    with pytest.raises(ValueError, match="whole vocabulary"):
        KronLoraLLLaplace(peft_model("llama-lm"), "language_modeling")
    la = language_posterior(enable_backprop=True)
    batch = text_batch()
    with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
        la(batch)
    with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
        la.backend.jacobians(batch)
    for readout in (LOGITS, CONTRASTS):
        with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
            Predictor(la.fitted).forms(batch, readout, lambda _, e: e.unsqueeze(1))
    with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
        la.backend.jacobians(batch, enable_backprop=True)
    with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
        la.backend.selected_output_jacobians(batch, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="marglik"):
        la.optimize_prior_precision(method="gridsearch", val_loader=text_loader())
    with pytest.raises(ValueError, match=r"language_modeling posterior by .*'widest'"):
        la.calibrate(text_loader())
    monkeypatch.setattr(likelihoods_module, "EXACT_VOCABULARY", 10)
    with pytest.raises(ValueError, match="49 backward passes per token"):
        language_posterior(**EXACT)


def test_bad_batches_are_refused_and_the_posterior_stays():
    la = language_posterior()
    before = la.log_marginal_likelihood()
    batch = text_batch()
    with pytest.raises(TypeError, match="collators"):
        la.fit(DataLoader([(row, row) for row in batch["input_ids"]], batch_size=2))
    for labels in (batch["labels"][:, :-1], batch["labels"].double(), batch["labels"][:, 0]):
        with pytest.raises(ValueError, match="one integer label per token"):
            la.fit(text_loader(2, {**batch, "labels": labels}))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.49"):
        la.fit(text_loader(2, {**batch, "labels": batch["labels"] + 90}))
    with pytest.raises(TypeError, match="no 'labels', which mark"):
        la.model({"input_ids": batch["input_ids"]})
    assert torch.equal(la.log_marginal_likelihood(), before)


def test_sampled_weights_give_the_logits_of_scored_tokens():
    la = language_posterior()
    samples = la.predictive_samples(text_batch(), pred_type="nn", n_samples=2)
    logits = la.model(text_batch())
    assert samples.shape == (2, *logits.shape) and (samples < 0).any()
