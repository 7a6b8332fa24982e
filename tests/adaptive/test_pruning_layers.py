"""Pruning layers of all kinds: what is not pruned stays, and saved adapters load."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel
from laplace_lora.adaptive import IVON, adalora_to_lora, prune_adapter, remove_pruned_triplets
from laplace_lora.adaptive.lora_components import lora_components
from laplace_lora.adaptive.scores import PosteriorScore
from support.adalora import kept, layers_of, tiny_adalora
from support.batches import loader, token_batch
from support.models import base_model, excite, peft_model
from support.references import assert_near


def logits(model):
    with torch.no_grad():
        return LogitsModel(model.eval())(token_batch((4, 3, 5)))


def fitted(model):
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    return la


def assert_loads(model, base, compute, folder):
    before = compute(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    assert_near(compute(PeftModel.from_pretrained(base, folder).eval()), before, 1e-6)


def test_adapters_of_embeddings_are_saved_with_a_pruned_adapter(tmp_path):
    model = peft_model("bert", target_modules=["query", "value", "word_embeddings"])
    ranks = prune_adapter(model, fitted(model), 1)
    assert not any("embeddings" in name for name in ranks)
    assert_loads(model, base_model("bert").double(), logits, tmp_path)


def test_another_adapter_stays_where_the_pruned_one_is_gone(tmp_path):
    model = peft_model("bert")
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    before = logits(excite(model))
    model.set_adapter("default")
    ranks = prune_adapter(model, fitted(model), 0.5)
    assert 0 in ranks.values()
    assert_loads(model, base_model("bert").double(), logits, tmp_path)
    model.set_adapter("second")
    assert_near(logits(model), before, 1e-12)


def test_an_adalora_adapter_is_pruned_twice():
    model = tiny_adalora(dtype=torch.float64).eval()
    with torch.no_grad():
        layers_of(model)[0].E.zero_()
    remove_pruned_triplets(model)
    ranks = prune_adapter(model, fitted(model), 2)
    assert len(ranks) == 3
    assert sum(ranks.values()) == 6 == kept(model)


def convolutions():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers, *head).double()


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator)


def on_images(model):
    with torch.no_grad():
        return model(images())


def adapted_convolutions(config):
    return excite(get_peft_model(convolutions(), config, autocast_adapter_dtype=False)).eval()


def test_convolutions_are_pruned_by_their_kernels(tmp_path):
    model = adapted_convolutions(LoraConfig(r=3, target_modules=["0", "2"]))
    la = DiagLoraLaplace(model, "classification")
    la.fit(DataLoader(TensorDataset(images(), torch.arange(6) % 3), batch_size=3))
    layers = lora_components(model, "default")
    scores = PosteriorScore(la, "snr").scores(layers)
    for layer, found in zip(layers, scores, strict=True):
        (A, a), (B, b) = (la.marginals()[p] for p in layer.parameters)
        for i in range(3):
            expected = (A[i].abs() / a[i]).mean() + (B[:, i].abs() / b[:, i]).mean()
            assert_near(found[i], expected, 1e-9)
    ranks = prune_adapter(model, la, 2)
    assert sum(ranks.values()) == 4
    assert_loads(model, convolutions(), on_images, tmp_path)


def test_convolutions_of_adalora_become_lora():
    config = AdaLoraConfig(
        init_r=3, target_r=2, tinit=1, tfinal=1, total_step=8, target_modules=["0", "2"]
    )
    model = adapted_convolutions(config)
    before = on_images(model)
    assert_near(on_images(adalora_to_lora(model).eval()), before, 1e-9)


class Experts(nn.Module):
    """A layer whose weights are stacked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4, 4))

    def forward(self, x):
        return torch.einsum("nq,epq->np", x, self.weight)


def test_stacked_weights_are_not_pruned():
    base = nn.Sequential(Experts(), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["1"], target_parameters=["0.weight"])
    model = get_peft_model(base, config)
    ivon = IVON(model.parameters(), ess=9)
    with pytest.raises(ValueError, match=r"that of several maps.*cannot shrink"):
        prune_adapter(model, ivon, 1, "magnitude")
