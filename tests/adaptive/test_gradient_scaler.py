"""IVON under `torch.amp.GradScaler`: its factor is in no mean and no curvature."""

import pytest
import torch
from torch import nn

from laplace_lora.adaptive import IVON
from support.references import assert_near


def regression(hess_approx="price"):
    w = nn.Parameter(torch.ones(3))
    generator = torch.Generator().manual_seed(1)
    ivon = IVON(
        [w],
        lr=0.1,
        ess=10,
        betas=(0.9, 0.9),
        hess_init=1.0,
        clip_radius=10.0,
        hess_approx=hess_approx,
        generator=generator,
    )
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(2))
    return w, ivon, lambda: (x @ w - x.sum(1)).square().mean()


def trained(hess_approx, scaled, draws, unscales=False):
    w, ivon, loss = regression(hess_approx)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for _ in range(4):
        for _ in range(draws):
            with ivon.sampled_params(train=True):
                ivon.zero_grad()
                scaler.scale(loss()).backward()
                if unscales:
                    scaler.unscale_(ivon)
        scaler.step(ivon)
        scaler.update()
    return torch.cat([w.detach(), ivon.state[w]["hessian"]])


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("draws", [1, 2])
def test_a_scaler_changes_no_step(hess_approx, draws):
    plain = trained(hess_approx, False, draws)
    assert_near(trained(hess_approx, True, draws), plain, 1e-5)
    if draws == 1:
        assert_near(trained(hess_approx, True, 1, unscales=True), plain, 1e-5)


def test_a_step_that_overflows_is_left_out():
    w, ivon, loss = regression()
    scaler = torch.amp.GradScaler("cpu")
    before = w.detach().clone()
    with ivon.sampled_params(train=True):
        scaler.scale(loss() * torch.inf).backward()
    scaler.step(ivon)
    scaler.update()
    assert torch.equal(w, before)
    assert not ivon.collected
    assert scaler.get_scale() < 2.0**16


def test_unscaling_after_the_draw_is_refused():
    _, ivon, loss = regression()
    scaler = torch.amp.GradScaler("cpu")
    with ivon.sampled_params(train=True):
        scaler.scale(loss()).backward()
    scaler.unscale_(ivon)
    with pytest.raises(RuntimeError, match="unscale_ was called after gradients were collected"):
        scaler.step(ivon)


def test_a_loaded_state_forgets_what_was_collected():
    _, ivon, loss = regression()
    state = ivon.state_dict()
    with ivon.sampled_params(train=True):
        loss().backward()
    ivon.load_state_dict(state)
    with pytest.raises(RuntimeError, match="no gradient was computed"):
        ivon.step()


def test_gradients_are_unscaled_for_scores():
    """Sensitivities are read after the step."""
    gradients = []
    for scaled in (False, True):
        w, ivon, loss = regression()
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        with ivon.sampled_params(train=True):
            scaler.scale(loss()).backward()
        scaler.step(ivon)
        gradients.append(w.grad)
    assert_near(gradients[1], gradients[0], 1e-6)
