"""Models whose tangents are compared with explicit Jacobians."""

import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, jacrev
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from laplace_lora import (
    KronLoraLaplace,
)
from laplace_lora.generation.sampled_predictor import SampledPredictor
from support.generation import K, seeded
from support.language import text_loader
from support.models import TINY, excite, peft_model

SIZES = {**TINY, "max_position_embeddings": 32}
MADE = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)),
}
NAMES = ["llama-lm", "gpt2-lm", *MADE]


def language_model(name, **kwargs):
    if name not in MADE:
        return peft_model(name, **kwargs)
    torch.manual_seed(0)
    base = MADE[name]()
    kwargs.setdefault("target_modules", ["q_proj", "v_proj", "down_proj"])
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, **kwargs)
    return excite(get_peft_model(base, config)).double()


def fitted(name="llama-lm", cls=KronLoraLaplace, model=None, **kwargs):
    la = cls(model or language_model(name), "language_modeling", **kwargs)
    la.fit(text_loader())
    return la


def explicit_samples(la, batch, directions):
    """Logits of all tokens, and J δ with a Jacobian by reverse mode, one text at a time."""
    model = la.logits_model.model.eval()
    before = model.get_base_model().config._attn_implementation
    model.get_base_model().set_attn_implementation("eager")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    means, moved = [], []
    for n, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][n : n + 1, mask]

        def f(w, ids=ids):
            return functional_call(model, w, (), {"input_ids": ids, "use_cache": False}).logits[0]

        J = jacrev(f)(weights)
        J = torch.cat([J[name].flatten(2) for name in names], -1)
        means.append(f(weights).detach())
        moved.append(torch.einsum("tvp,kp->ktv", J, directions))
    model.get_base_model().set_attn_implementation(before)
    return means, moved


def read_all(la, batch, n_samples=4, cached=True, columns=None):
    predictor = SampledPredictor(la, K, n_samples, seeded())
    width = batch["input_ids"].shape[1]
    with predictor.opened({k: v for k, v in batch.items() if k != "labels"}, cached) as texts:
        parts = list(texts.logits(torch.arange(width)))
    return torch.cat([p[1] for p in parts], 1), torch.cat([p[2] for p in parts], 2)
