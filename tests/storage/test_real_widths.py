"""A posterior's whole life at the widths of real models, where tiny ones hide overflows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laplace_lora import KronLoraLaplace
from support.interruptions import Interrupted, Interruption
from support.real_widths import SIZES, wide_loader, wide_model, wide_posterior
from support.references import assert_near

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wide")


@pytest.fixture(scope="module")
def lives(folder):
    """Fit, tune and save at each size; load all in one new process."""
    lives = {}
    for name in SIZES:
        model = wide_model(name)
        la = wide_posterior(name, model)
        la.fit(wide_loader(name, 0))
        la.optimize_prior_precision(method="marglik")
        la.save_pretrained(folder / name, precision="exact")
        lives[name] = model, la
    program = (
        "import sys, pathlib, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]); "
        "from support.real_widths import reloaded; reloaded(pathlib.Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", program, TESTS, folder], check=True)
    return lives, torch.load(folder / "reloaded.pt")


@pytest.fixture(params=SIZES)
def life(lives, request):
    name = request.param
    return (name, *lives[0][name], lives[1][name])


def test_some_weight_has_entries_that_single_precision_cannot_count(life):
    _, model, _, _ = life
    largest = max(p.numel() for p in model.parameters())
    assert largest > 2**24 and float(torch.tensor(largest - 1, dtype=torch.float32)) >= largest


def test_fit_and_prediction_equal_explicit_gradients(life):
    """The evidence's loss and one example's logits variance, by autograd on the parameters."""
    _, _, la, _ = life
    batch = next(iter(wide_loader(life[0], 2)))
    one = {key: value[:1] for key, value in batch.items()}
    f = la.model.eval()(one)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, la.params, retain_graph=True)])
        for out in f[0]
    ]
    mean, jacobians = la.fitted.engine.jacobian_blocks(one)
    assert_near(mean, f.detach())
    found = torch.cat([block.flatten(2) for block in jacobians], dim=-1)[0]
    assert_near(found.detach(), torch.stack(rows), 1e-4)
    loss = sum(
        torch.nn.functional.cross_entropy(la.model(b), b["labels"], reduction="sum").item()
        for b in wide_loader(life[0], 0)
    )
    assert la.loss == pytest.approx(loss, rel=1e-4)


def test_a_new_process_predicts_the_same(life):
    name, _, la, loaded = life
    assert torch.equal(loaded, la(next(iter(wide_loader(name, 2)))))


def test_fits_add_up_and_merge(life, folder):
    name, model, _, _ = life
    added, merged = (KronLoraLaplace.from_pretrained(model, folder / name) for _ in range(2))
    more = wide_posterior(name, model)
    more.fit(wide_loader(name, 1), evidence_correction=False)
    added.fit(wide_loader(name, 1), override=False)
    merged.merge([more])
    batch = next(iter(wide_loader(name, 2)))
    assert merged.n_data == added.n_data == 8
    assert_near(merged(batch), added(batch), 1e-4)


def test_an_interrupted_fit_resumes(life, tmp_path):
    name, model, la, _ = life
    resumed = wide_posterior(name, model)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "evidence_correction": False}
    with pytest.raises(Interruption):
        resumed.fit(Interrupted(wide_loader(name, 0), 1), **options)
    resumed.fit(wide_loader(name, 0), **options)
    resumed.prior_precision = la.prior_precision
    batch = next(iter(wide_loader(name, 2)))
    assert torch.equal(resumed(batch), la(batch))
