"""Gradients that earlier draws left are not taken for those of a draw."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from laplace_lora.adaptive import IVON
from support.references import assert_near

X = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
Y = torch.tensor([1.0, -1.0], dtype=torch.float64)
START = torch.tensor([0.5, -0.3], dtype=torch.float64)
REFUSAL = "gradients of before this draw"


def regression():
    w = nn.Parameter(START.clone())
    generator = torch.Generator().manual_seed(0)
    options = {"betas": (0.0, 0.0), "hess_init": 1.0, "clip_radius": 10.0, "weight_decay": 0.1}
    return w, IVON([w], lr=0.1, ess=10, generator=generator, **options)


def loss_of(w, i):
    return 0.5 * (X[i] @ w - Y[i]).square()


def expected(draws):
    """Momentum and curvature of draws, each of the mean over its own examples."""
    generator, std = torch.Generator().manual_seed(0), 11**-0.5
    momentum, estimate = torch.zeros(2, 2, dtype=torch.float64)
    for examples in draws:
        noise = torch.randn(2, dtype=torch.float64, generator=generator) * std
        x, y = X[examples], Y[examples]
        gradient = x.T @ (x @ (START + noise) - y) / len(examples)
        momentum += gradient / len(draws)
        estimate += gradient * noise * 11 / len(draws)
    return momentum, estimate + 0.5 * (1 - estimate).square() / 1.1


def assert_moved_by(w, optimizer, draws):
    optimizer.step()
    momentum, hessian = expected(draws)
    assert_near(optimizer.state[w]["momentum"], momentum, 1e-12)
    assert_near(optimizer.state[w]["hessian"], hessian, 1e-12)


def to_none(w, optimizer, place):
    if place == "inside":
        optimizer.zero_grad()


def in_place(w, optimizer, place):
    if place == "inside":
        optimizer.zero_grad(set_to_none=False)


def before_the_draw(w, optimizer, place):
    if place == "before":
        optimizer.zero_grad(set_to_none=False)


def by_hand(w, optimizer, place):
    if place == "inside" and w.grad is not None:
        w.grad.zero_()


def by_a_multiplication(w, optimizer, place):
    if place == "before" and w.grad is not None:
        torch._foreach_mul_([w.grad], 0.0)


@pytest.mark.parametrize("zero", [to_none, in_place, before_the_draw, by_hand, by_a_multiplication])
def test_draws_are_averaged_however_gradients_are_zeroed(zero):
    w, optimizer = regression()
    for i in range(2):
        zero(w, optimizer, "before")
        with optimizer.sampled_params(train=True):
            zero(w, optimizer, "inside")
            loss_of(w, i).backward()
    assert not w._backward_hooks
    assert_moved_by(w, optimizer, [[0], [1]])


@pytest.mark.parametrize("zero", [to_none, in_place, before_the_draw])
def test_micro_batches_accumulate_in_a_draw(zero):
    w, optimizer = regression()
    w.grad = torch.ones_like(w)  # of the step before
    zero(w, optimizer, "before")
    with optimizer.sampled_params(train=True):
        zero(w, optimizer, "inside")
        for i in range(2):
            (loss_of(w, i) / 2).backward()
    assert_moved_by(w, optimizer, [[0, 1]])


@pytest.mark.parametrize("uses", [0, 1, 2])
def test_gradients_that_were_left_are_refused(uses):
    """Also those of a draw that does not use the parameter."""
    w, optimizer = regression()
    (loss_of(w, 0) / 2).backward()
    left = w.grad
    with (
        pytest.raises(RuntimeError, match=REFUSAL),
        optimizer.sampled_params(train=True),
    ):
        for i in range(uses):
            (loss_of(w, i) / 2).backward()
    assert torch.equal(w, START) and w.grad is left
    assert not w._backward_hooks and not optimizer.collected and not optimizer.draws


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_that_is_replaced_by_its_sum_is_refused():
    w, optimizer = regression()
    loss_of(w, 0).backward()
    with pytest.raises(RuntimeError, match=REFUSAL), optimizer.sampled_params(train=True):
        loss_of(w, 1).backward(create_graph=True)  # which adds out of place
    w.grad = None


def test_gradients_that_are_given_are_taken():
    w, optimizer = regression()
    for i in range(2):
        with optimizer.sampled_params(train=True):
            w.grad = None
            w.grad = X[i] * (X[i] @ w.detach() - Y[i])
    assert_moved_by(w, optimizer, [[0], [1]])


def assigned(w, optimizer, i):
    (w.grad,) = torch.autograd.grad(loss_of(w, i), w)


def copied(w, optimizer, i):
    w.grad.copy_(*torch.autograd.grad(loss_of(w, i), w))


def after_a_penalty(w, optimizer, i):
    loss = loss_of(w, i)
    (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
    optimizer.zero_grad()
    (loss + 0 * gradient.square().sum()).backward()


def after_another_pass(w, optimizer, i):
    loss_of(w, 1 - i).backward()
    optimizer.zero_grad()
    loss_of(w, i).backward()


@pytest.mark.parametrize("differentiate", [assigned, copied, after_a_penalty, after_another_pass])
def test_gradients_that_are_not_added_up_are_taken(differentiate):
    w, optimizer = regression()
    w.grad = torch.ones_like(w)  # of the step before
    for i in range(2):
        with optimizer.sampled_params(train=True):
            differentiate(w, optimizer, i)
    assert_moved_by(w, optimizer, [[0], [1]])


def test_draws_that_collect_nothing_leave_gradients_alone():
    w, optimizer = regression()
    loss_of(w, 0).backward()
    left = w.grad.clone()
    with optimizer.sampled_params(), torch.no_grad():
        loss_of(w, 1)
    assert torch.equal(w.grad, left) and not w._backward_hooks


def test_accelerates_accumulation_is_refused_with_a_way_out():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    w, optimizer = regression()
    module = nn.Module()
    module.w, prepared = w, accelerator.prepare(optimizer)
    with pytest.raises(RuntimeError, match=r"accumulate\(\) divides losses"):
        for i in range(2):
            with accelerator.accumulate(module):
                with optimizer.sampled_params(train=True):
                    accelerator.backward(loss_of(w, i))
                prepared.step()
                prepared.zero_grad()  # does nothing but in the last micro-batch of a step
