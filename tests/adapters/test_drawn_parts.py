"""Summaries of what PEFT draws: a known answer, a bounded sample, other seeds and signs."""

import pytest
import torch
from peft import FrodConfig, OSFConfig, PsoftConfig, VeraConfig
from peft import get_peft_model as adapted

from laplace_lora.adapters.drawn_parts import SAMPLED, _summary, are_drawn_alike, drawn_parts
from support.models import base_model

VALUES = {"target_modules": ["query", "value"]}
FROD = {"sparse_rate": 0.3, "progressbar": False}


def test_a_summary_is_that_of_evenly_spaced_numbers():
    values = torch.randn(3, 5)
    places = torch.arange(1.0, 16, dtype=torch.float64)
    sums = [float((values.flatten().double() * (places * n).cos()).sum()) for n in range(1, 9)]
    assert _summary(values) == pytest.approx([float(values.norm()), *sums], rel=1e-6)
    large = torch.arange(2 * SAMPLED - 1).remainder(1000).double()
    assert _summary(large) == _summary(large[::2])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("are_saved", [False, True])
def test_what_layers_share_beside_their_buffers_is_seen(are_saved):
    def parts(key):
        config = FrodConfig(**VALUES, **FROD, save_projection=are_saved, projection_prng_key=key)
        return drawn_parts(adapted(base_model("bert"), config))

    first = parts(0)
    shared = [name for name in first if "frod_s_indices" in name]
    assert len(shared) == 2 and are_drawn_alike(first, parts(0))
    assert not are_drawn_alike(first, parts(1))


@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
def test_what_layers_share_as_buffers_is_summarised_once():
    model = adapted(base_model("bert"), VeraConfig(r=2, save_projection=False, **VALUES))
    assert len(drawn_parts(model)) == 2


def test_singular_vectors_of_the_base_model_that_change_nothing_are_left_out():
    model = adapted(base_model("bert"), OSFConfig(effective_rank=8, **VALUES))
    assert drawn_parts(model) == {}


def test_a_projection_with_another_sign_is_another_one():
    model = adapted(base_model("bert"), PsoftConfig(r=8, **VALUES))
    first = drawn_parts(model)
    layer = next(m for m in model.modules() if hasattr(m, "_psoft_A_cache"))
    layer._psoft_A_cache["default"].mul_(1.02)
    assert are_drawn_alike(first, drawn_parts(model))
    layer._psoft_A_cache["default"][3].neg_()
    assert not are_drawn_alike(first, drawn_parts(model))
