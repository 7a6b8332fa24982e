"""Texts with a label per token, tiny token classifiers, and posteriors fitted on them."""

from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertForTokenClassification,
    GPT2ForTokenClassification,
    LlamaForTokenClassification,
)

from laplace_lora import KronLoraLaplace
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import rows, token_batch
from support.models import bert_config, excite, gpt2_config, llama_config
from support.references import explicit_jacobians

CLASSES = 3
LENGTHS = (4, 6, 3)
EXACT = {"backend_kwargs": {"stochastic": False}}
TAGGERS = {
    "bert": (BertForTokenClassification, bert_config, ["query", "value"]),
    "llama": (LlamaForTokenClassification, llama_config, ["q_proj", "down_proj"]),
    "gpt2": (GPT2ForTokenClassification, gpt2_config, ["c_attn"]),
}


def tagger(name="bert", dtype=torch.float64, **kwargs):
    """A tiny token classifier with PEFT's task type, whose head is trained as well."""
    kind, config, modules = TAGGERS[name]
    torch.manual_seed(0)
    base = kind(config(num_labels=CLASSES))
    kwargs = {"target_modules": modules, "task_type": "TOKEN_CLS", **kwargs}
    lora = LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=name == "gpt2", **kwargs)
    return excite(get_peft_model(base, lora)).to(dtype)


def tagged_batch(lengths=LENGTHS, **kwargs):
    """Texts whose first token, as of special tokens, has no label; nor has padding."""
    batch = token_batch(lengths, **kwargs)
    real = batch["attention_mask"].bool()
    labelled = real & (batch["attention_mask"].cumsum(1) > 1)
    return {**batch, "labels": (batch["input_ids"] % CLASSES).masked_fill(~labelled, IGNORED)}


def tagged_loader(batch_size=2, batch=None):
    batch = batch or tagged_batch()
    return DataLoader([rows(batch, n) for n in range(len(batch["labels"]))], batch_size=batch_size)


def tagged_posterior(
    cls=KronLoraLaplace, name="bert", fit=True, dtype=torch.float64, model=None, **kwargs
):
    la = cls(model or tagger(name, dtype), "token_classification", **kwargs)
    if fit:
        torch.manual_seed(0)
        la.fit(tagged_loader())
    return la


def tag_ggn(la, batch):
    """Sum of Jᵀ Λ J over all labelled tokens, with a Jacobian for every token and logit."""
    J = torch.cat([J.flatten(2) for J in explicit_jacobians(la.model, batch)], -1)
    roots = torch.einsum("csv,svp->csp", softmax_root(la.model(batch).detach()), J).flatten(0, 1)
    return roots.T @ roots


class PaddedTagger(nn.Module):
    """A token classifier whose states, logits included, are anything at padding."""

    def __init__(self, filling):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.classifier = nn.Linear(8, CLASSES)
        self.filling = filling

    def forward(self, input_ids, attention_mask):
        padding = attention_mask.unsqueeze(-1) == 0
        h = self.embed(input_ids).masked_fill(padding, self.filling)
        h = h + torch.tanh(self.first(h))
        context = h.masked_fill(padding, 0).sum(1, keepdim=True)
        h = (h + context).masked_fill(padding, self.filling)
        return SimpleNamespace(logits=self.classifier(self.norm(h)))


def padded_tagger(filling):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["first", "classifier"])
    return excite(get_peft_model(PaddedTagger(filling), lora)).double()
