"""`MCDropout` has dropout on in its own thread alone, and draws from generators of its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.evaluation import MAP, MCDropout
from laplace_lora.evaluation.sampled_dropout import _Masks
from support.batches import loader, token_batch
from support.models import adalora_model, peft_model
from support.threads import in_threads

BATCH = token_batch((3, 5, 4))
KINDS = {
    "lora": lambda: peft_model("llama"),
    "dora": lambda: peft_model("llama", use_dora=True),
    "adalora": lambda: adalora_model("bert"),
}


@torch.no_grad()
def in_training_mode(model, n_samples, seed):
    """The mean over masks that torch draws in layers of LoRA that are in training mode."""
    for name, module in model.eval().named_modules():
        module.training = ".lora_dropout." in name or hasattr(module, "lora_A")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        samples = [model(BATCH).softmax(-1) for _ in range(n_samples)]
    model.eval()
    return torch.stack(samples).mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_they_do_in_training(kind):
    model = LogitsModel(KINDS[kind]())
    expected = in_training_mode(model, 3, seed=5)
    assert torch.equal(MCDropout(model, n_samples=3, seed=5)(BATCH), expected)
    assert (expected - MAP(model)(BATCH)).abs().max() > 1e-4


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_are_those_of_torch(p, dtype):
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(0, 1)
    masks = _Masks(2)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for _ in range(2):
            assert torch.equal(masks.drop(x, p), F.dropout(x, p))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_no_thread_sees_the_dropout_of_another(kind):
    model = KINDS[kind]().eval()
    la = KronLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    sampled = MCDropout(la.logits_model, n_samples=4)
    inputs = {k: v for k, v in BATCH.items() if k != "labels"}

    @torch.no_grad()
    def plain():
        return model(**inputs).logits

    jobs = [lambda: sampled(BATCH), lambda: sampled(BATCH), lambda: la(BATCH).detach(), plain]
    expected = [job() for job in jobs]
    results, errors = in_threads(jobs)
    assert not errors, errors[0]
    for mine, alone in zip(results, expected, strict=True):
        assert all(torch.equal(result, alone) for result in mine)
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(plain(), expected[-1])


def test_the_dropout_of_attentions_stays_off():
    """They are told its share as a number, and apply it where they are in training mode."""
    model = peft_model("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
        if isinstance(module, nn.Dropout):
            module.p = 1e-12
    assert torch.equal(MCDropout(model, n_samples=2)(BATCH), MAP(model)(BATCH))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_compiled_layers_are_sampled():
    model = peft_model("llama")
    expected = MCDropout(model, n_samples=2)(BATCH)
    model.get_base_model().model.compile(backend="eager")
    assert torch.allclose(MCDropout(model, n_samples=2)(BATCH), expected)
