"""Hooks of tensors, such as masks of gradients, are no part of derivatives in any thread."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from laplace_lora import DiagLoraLaplace
from laplace_lora.capture.parameter_hooks import without_hooks
from support.batches import loader, token_batch
from support.models import base_model, excite

WAIT = 20  # seconds, at most


def gradient(tensor):
    return torch.autograd.grad(tensor.sum(), tensor)[0].tolist()


@pytest.fixture
def hooked():
    tensor = torch.ones(2, requires_grad=True)
    tensor.register_hook(lambda gradient: 5 * gradient)
    return tensor


def test_hooks_come_back_with_the_last_who_does_without(hooked):
    first, second = without_hooks([hooked]), without_hooks([hooked])
    before = hooked._backward_hooks
    first.__enter__()
    second.__enter__()
    assert gradient(hooked) == [1, 1]
    first.__exit__(None, None, None)
    assert gradient(hooked) == [1, 1]
    second.__exit__(None, None, None)
    assert gradient(hooked) == [5, 5] and hooked._backward_hooks is before


def test_hooks_that_are_registered_meanwhile_stay(hooked):
    with without_hooks([hooked]):
        hooked.register_hook(lambda gradient: 3 * gradient)
        with without_hooks([hooked]):
            assert gradient(hooked) == [1, 1]
            hooked.register_hook(lambda gradient: 7 * gradient)
    assert gradient(hooked) == [105, 105]


def test_a_thread_does_without_hooks_when_another_is_through():
    lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["word_embeddings"])
    model = excite(get_peft_model(base_model("bert"), lora)).double().eval()
    options = {"modules": "word_embeddings", "uncovered": "diag"}
    la = DiagLoraLaplace(model, "classification", **options)
    la.fit(loader())
    la.prior_precision = 0.1
    x, found = token_batch((3, 4)), []
    expected = la(x)
    inside, left = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: found.append(la(x)))

    def wait(gradient):
        """Let the other differentiate once this thread does, and go on when it is through."""
        if threading.current_thread() is other:
            inside.set()
            assert left.wait(WAIT)
        elif other.ident is None:
            other.start()
            assert inside.wait(WAIT)

    def on_gradient(module, args, output):
        if output.requires_grad:
            output.register_hook(wait)

    (weight,) = la.params
    weight.register_hook(torch.zeros_like)
    model.get_base_model().bert.embeddings.LayerNorm.register_forward_hook(on_gradient)
    assert torch.equal(la(x), expected)
    left.set()
    other.join()
    assert torch.equal(found[0], expected)
    assert weight._backward_hooks
