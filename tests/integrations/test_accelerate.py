"""Models and loaders that accelerate has prepared; several processes are in tests/data."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import evaluate
from support.batches import loader, token_batch
from support.models import peft_model
from support.references import assert_near

BATCH = token_batch((4, 2), seed=3)


def posterior_of(model, data, method="auto"):
    la = KronLoraLaplace(model, "classification")
    la.fit(data)
    la.optimize_prior_precision(method=method)
    return la


@pytest.fixture
def precision(request):
    AcceleratorState._reset_state(True)
    yield request.param
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("no", 1e-6), ("bf16", 3e-2)], indirect=["precision"]
)
def test_what_is_prepared_gives_what_the_plain_model_gives(precision, tolerance):
    plain = peft_model("bert").float()
    weights = [p for p in plain.parameters() if p.requires_grad]
    data = DataLoader(loader().dataset, batch_size=2)
    # Leave-one-out takes a width or none, and half precision may tip it over.
    method = "auto" if precision == "no" else "marglik"
    expected = posterior_of(copy.deepcopy(plain), data, method)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, _, prepared = accelerator.prepare(plain, torch.optim.AdamW(weights), data)
    la = posterior_of(model, prepared, method)
    assert la.n_data == expected.n_data == 7
    assert_near(la(BATCH), expected(BATCH), tolerance)
    report = evaluate(la, prepared, bootstrap=2)
    assert report["NLL"] == pytest.approx(
        evaluate(expected, data, bootstrap=2)["NLL"], abs=tolerance
    )
