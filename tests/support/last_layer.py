"""Last-layer posteriors by their names in laplace-torch."""

from laplace import DiagLLLaplace, FullLLLaplace, FunctionalLLLaplace, KronLLLaplace, Laplace

from laplace_lora import (
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraGGN,
)
from laplace_lora.models.last_layer_model import LastLayerModel
from support.batches import loader
from support.models import TARGETS, peft_model

PARAMETRIC = [KronLoraLLLaplace, DiagLoraLLLaplace, FullLoraLLLaplace]
PLAIN = {
    "kron": (KronLoraLLLaplace, KronLLLaplace),
    "diag": (DiagLoraLLLaplace, DiagLLLaplace),
    "full": (FullLoraLLLaplace, FullLLLaplace),
    "gp": (FunctionalLoraLLLaplace, FunctionalLLLaplace),
}
MODELS = ["llama", "llama-frozen", "bert", "bert-frozen", "roberta", "llama-lm"]


def last_layer_logits_model(name, **kwargs):
    base, _, frozen = name.partition("-frozen")
    if name.endswith("-frozen"):
        kwargs["modules_to_save"] = None
    del frozen
    targets = TARGETS if base.endswith("-lm") else None
    return LogitsModel(peft_model(base, **kwargs), target_ids=targets)


def padded(side):
    return loader(pad_to=9, side=side)


def by_name(model, structure, route, wrap=True):
    options = {"n_subset": 6} if structure == "gp" else {}
    if route == "last_layer":
        options["backend"] = LoraGGN
        model = LastLayerModel(model) if wrap else model
    return Laplace(
        model, "classification", subset_of_weights=route, hessian_structure=structure, **options
    )
