"""What Ctrl-C leaves of a model that is being changed, wherever it falls: the model as it was."""

from itertools import count

import pytest
import torch
from torch import nn

from laplace_lora import KronLoraLaplace
from laplace_lora.capture.parameter_hooks import without_hooks
from laplace_lora.models.changes import holders
from laplace_lora.models.changes.compiled import eager, is_compiled
from laplace_lora.models.changes.expert_layers import experts_as_layers
from laplace_lora.models.changes.modes import (
    differentiable,
    evaluation_mode,
    gradients_needed,
    weights_kept,
)
from laplace_lora.models.changes.narrowing import one_token, rows_only
from laplace_lora.models.changes.thread_hooks import own_hooks
from support.batches import loader, token_batch
from support.experts import experts_model
from support.interruptions import interrupted_at
from support.models import peft_model

# Python says so where an interrupt falls into the end of a generator that nobody needs any more.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def every_step(job, prepare=lambda: None):
    """Interrupt a job at each of its places in turn; yields after each."""
    for step in count(1):
        prepare()
        if not interrupted_at(step, job):
            return
        yield step


def nothing_is_held():
    return not any(each._held for each in holders._EVERY)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 5)).requires_grad_(False)


def modes_held(model, seen):
    with evaluation_mode(model), gradients_needed(list(model.parameters())):
        pass


def hooks_registered(model, seen):
    with own_hooks() as hooks:
        for layer in model:
            hooks.on_input(layer, lambda args, kwargs: seen.append(args))
            hooks.on_output(layer, lambda args, kwargs, out: seen.append(out), first=True)


def head_narrowed(model, seen):
    with one_token(model[-1], None, keep_length=True), rows_only(model[-1], torch.tensor([1, 2])):
        pass


def weights_overwritten(model, seen):
    with weights_kept(list(model.parameters())), torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


def hooks_of_tensors_suspended(model, seen):
    with without_hooks(list(model.parameters())):
        pass


JOBS = (
    modes_held,
    hooks_registered,
    head_narrowed,
    weights_overwritten,
    hooks_of_tensors_suspended,
)


@pytest.mark.parametrize("job", JOBS)
def test_a_model_is_as_it_was_wherever_an_interrupt_falls(job):
    model, seen = net(), []
    expected = model.eval()(X)
    model[0].weight._backward_hooks = hooks = {0: print}
    steps = 0
    for steps in every_step(lambda: job(model, seen), prepare=model.train):  # noqa: B007
        assert all(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert model[0].weight._backward_hooks is hooks
        assert "forward" not in vars(model[-1]) and nothing_is_held()
        seen.clear()
        assert torch.equal(model.eval()(X), expected) and not seen
    assert steps > 10


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_a_compiled_model_is_compiled_again_wherever_an_interrupt_falls():
    module = nn.Linear(4, 2)
    module.compile(backend="eager")
    before = dict(vars(module))

    def job():
        with eager([module]):
            assert not is_compiled(module)

    for _ in every_step(job):
        assert vars(module) == before and nothing_is_held()


def test_experts_run_as_ever_wherever_an_interrupt_falls():
    model = experts_model("mixtral")
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]

    def job():
        with experts_as_layers(modules):
            pass

    for _ in every_step(job):
        assert nothing_is_held()
        with experts_as_layers(modules):
            pass
        assert all(vars(m).keys() == own.keys() for m, own in zip(modules, before, strict=True))


def test_what_is_held_is_changed_again_if_it_was_changed_back():
    """A user may call ``train()`` while a thread predicts, or after an interrupt."""
    model = net().train()
    with evaluation_mode(model):
        model.train()
        with evaluation_mode(model), differentiable(list(model.modules())):
            assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_predictions_after_an_interrupted_one_are_right():
    model = peft_model("llama")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    batch = token_batch((3, 5, 4))
    expected = la(batch).detach()
    total = next(k for k in count(1000, 1000) if not interrupted_at(k, lambda: la(batch)))
    for step in range(1, total, max(total // 40, 1)):
        model.train()
        interrupted_at(step, lambda: la(batch))
        assert all(module.training for module in model.modules()) and nothing_is_held()
        assert torch.equal(la(batch), expected)
