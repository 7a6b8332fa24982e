"""Questions whose answers are parts of a text, tiny models, and posteriors fitted on them."""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertForQuestionAnswering, LlamaForQuestionAnswering

from laplace_lora import KronLoraLaplace
from support.batches import rows, token_batch
from support.models import bert_config, excite, llama_config
from support.references import explicit_jacobians

LENGTHS, STARTS, ENDS = (5, 7, 4), (1, 2, 0), (3, 2, 0)
EXACT = {"backend_kwargs": {"stochastic": False}}
READERS = {
    "bert": (BertForQuestionAnswering, bert_config, ["query", "value"]),
    "llama": (LlamaForQuestionAnswering, llama_config, ["q_proj", "down_proj"]),
}


def reader(name="bert", dtype=torch.float64):
    """A tiny model that answers questions, with PEFT's task type, whose head is trained as well."""
    kind, config, modules = READERS[name]
    torch.manual_seed(0)
    lora = LoraConfig(task_type="QUESTION_ANS", r=2, lora_alpha=4, target_modules=modules)
    return excite(get_peft_model(kind(config()), lora)).to(dtype)


def question_batch(lengths=LENGTHS, starts=STARTS, ends=ENDS, side="right", **kwargs):
    """Questions, the third one without an answer."""
    batch = token_batch(lengths, side=side, **kwargs)
    del batch["labels"]
    width = batch["input_ids"].shape[1]
    shift = torch.tensor([0 if side == "right" else width - length for length in lengths])
    positions = {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}
    return {**batch, **{name: values + shift for name, values in positions.items()}}


def question_loader(batch_size=2, batch=None):
    batch = batch or question_batch()
    examples = [rows(batch, n) for n in range(len(batch["input_ids"]))]
    return DataLoader(examples, batch_size=batch_size)


def span_posterior(
    cls=KronLoraLaplace, name="bert", fit=True, dtype=torch.float64, model=None, **kwargs
):
    la = cls(model or reader(name, dtype), "question_answering", **kwargs)
    if fit:
        torch.manual_seed(0)
        la.fit(question_loader())
    return la


def span_ggn(la, batch):
    """Sum of Jᵀ Λ J with the dense Hessians of two softmaxes over the tokens."""
    J = torch.cat([J.flatten(2) for J in explicit_jacobians(la.model, batch)], -1)
    total = 0
    for half, f in zip(J.chunk(2, dim=1), la.model(batch).detach().chunk(2, dim=1), strict=True):
        p = f.softmax(-1)
        hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        total = total + torch.einsum("nip,nij,njq->pq", half, hessian, half)
    return total
