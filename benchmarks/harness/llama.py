"""The model, the batch, the bare passes and the peers that the speed benchmarks share.

The model is a Llama built from a config with random weights and a LoRA adapter whose two factors
are both non-zero, so that gradients reach every adapter weight. No file is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.harness.quantised import quantise_4bit
from laplace_lora import LogitsModel

ALL_PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


def llama_with_lora(
    config: LlamaConfig,
    rank: int,
    targets: list[str],
    dtype: torch.dtype,
    device: str,
    quantised: bool = False,
    dropout: float = 0.0,
) -> PeftModel:
    """Build a Llama with a LoRA adapter on some of its projections, with random weights.

    Args:
        config: Shape of the model.
        rank: LoRA rank r.
        targets: Names of the projections that get an adapter.
        dtype: Of the base weights. PEFT keeps adapters in float32 or better.
        device: Where to build; ``meta`` allocates nothing.
        quantised: Quantise the base to 4 bits.
        dropout: Of the adapter; only in training mode.

    Returns:
        The model in eval mode; ``lora_B`` is drawn from a normal of standard deviation 0.02.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if quantised:
            model = quantise_4bit(model, dtype)
        lora = LoraConfig(
            r=rank,
            lora_alpha=16,
            lora_dropout=dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(model, lora)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return peft_model.to(device).eval()


@dataclass
class Workload:
    """One batch and the model that turns it into ``(batch, classes)`` logits."""

    model: LogitsModel
    batch: dict[str, Tensor]
    labels: Tensor
    classes: int

    @property
    def examples(self) -> list[dict[str, Tensor]]:
        """The batch, one example after the other."""
        return [{k: v[i] for k, v in self.batch.items()} for i in range(len(self.labels))]

    @property
    def n_parameters(self) -> int:
        """Number of adapter weights."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def random_llama(args: argparse.Namespace, dropout: float = 0.0) -> PeftModel:
    """Build the model that the size arguments describe, with dropout of the adapter."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        intermediate_size=args.intermediate or 4 * args.hidden,
        vocab_size=args.vocab,
        attn_implementation=args.attention,
        use_cache=False,
    )
    dtype = getattr(torch, args.dtype)
    quantised = bool(getattr(args, "quantised", None))
    return llama_with_lora(config, args.rank, args.targets, dtype, args.device, quantised, dropout)


def make_workload(peft_model: PeftModel, args: argparse.Namespace, classes: int) -> Workload:
    """Draw a batch without padding, and read the logits of the first ``classes`` token ids."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    tokens = torch.randint(args.vocab, (args.batch, args.tokens), generator=generator)
    labels = torch.randint(classes, (args.batch,), generator=generator).to(args.device)
    tokens = tokens.to(args.device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    model = LogitsModel(peft_model, target_ids=list(range(classes))).eval()
    model.output_size = classes  # the ASDL peer reads it
    return Workload(model, batch, labels, classes)


@contextmanager
def adapter_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of all ``lora_A`` and ``lora_B`` maps during a forward pass."""
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("lora_A." in name or "lora_B." in name)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def bare_passes(work: Workload, passes: int) -> Tensor:
    """Run a forward pass and some backward passes to the adapters' outputs, and drop the gradients.

    This is the least that any method with exact output gradients of every adapter map must do.

    Args:
        work: Model and batch.
        passes: Number of backward passes, at most the number of classes.

    Returns:
        Logits, shape ``(batch, classes)``.
    """
    with adapter_outputs(work.model) as outputs:
        logits = work.model(work.batch)
    for column in torch.eye(work.classes, dtype=logits.dtype, device=logits.device)[:passes]:
        torch.autograd.grad(logits, outputs, column.expand_as(logits), retain_graph=True)
    return logits.detach()


def peer_backends(names: list[str], work: Workload) -> dict[str, object]:
    """Build laplace-torch's own backends on the same model, by class name."""
    import laplace.curvature

    return {name: getattr(laplace.curvature, name)(work.model, "classification") for name in names}


def peer_kron_runs(work: Workload) -> dict[str, partial]:
    """Return what laplace-torch's two K-FAC backends run per batch, by class name."""
    backends = peer_backends(["CurvlinopsGGN", "AsdlGGN"], work)
    n_data = len(work.labels)
    return {n: partial(b.kron, work.batch, work.labels, N=n_data) for n, b in backends.items()}
