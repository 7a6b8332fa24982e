"""AdaLoRA models, their triplets and a short training."""

import torch

from laplace_lora.adaptive import IVON
from laplace_lora.adaptive.allocation import adalora_components
from support.batches import token_batch
from support.models import adalora_model

SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 3, "total_step": 16}


def layers_of(model):
    """The triplets of each layer."""
    return adalora_components(model.base_model.model, "default")


def kept(model):
    """How many triplets are not masked."""
    return sum(int((layer.E != 0).sum()) for layer in layers_of(model))


def tiny_adalora(name="bert", dtype=torch.float32, **kwargs):
    model = adalora_model(name, dtype=dtype, **{**SCHEDULE, **kwargs})
    with torch.no_grad():
        for layer in layers_of(model):
            layer.E.add_(1.0)
    return model


def training(model, optimizer, steps, check=lambda step: None):
    """Train for some steps, and call ``check`` after each mask."""
    torch.manual_seed(0)
    for step in range(steps):
        batch = token_batch((4, 3, 5), seed=step)
        if isinstance(optimizer, IVON):
            with optimizer.sampled_params(train=True):
                model(**batch).loss.backward()
        else:
            model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        check(step)
        optimizer.zero_grad()
