"""Training-free Bayesianisation: the noise that its definition says, as wide as is allowed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForSequenceClassification

from laplace_lora.evaluation import MAP, TrainingFreeBayes
from laplace_lora.evaluation.training_free import _layers_of
from support.batches import LENGTHS, token_batch
from support.models import base_model, excite, peft_model
from support.references import assert_near
from support.tokens import tagged_batch, tagger

ANCHOR = [token_batch(LENGTHS)]
BATCH = token_batch((3, 5, 4))


def confident_model():
    model = peft_model("bert")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "classifier" in name:
                weight.mul_(20)
    return model


def expert_model():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    base = MixtralForSequenceClassification(MixtralConfig(vocab_size=50, **sizes, **heads))
    parameters = ["mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    return excite(get_peft_model(base, config))


def test_the_noise_is_isotropic_in_the_column_space_of_lora_b():
    model = peft_model("bert")
    modules = [module for module in model.modules() if hasattr(module, "lora_B")]
    for module, layer in zip(modules, _layers_of(model), strict=True):
        B = module.lora_B["default"].weight.detach()
        U = B @ layer.spread.to(B)
        assert_near(U.T @ U, torch.eye(U.shape[1]), 1e-5)
        assert_near(U @ (U.T @ B), B, 1e-5)


def test_directions_that_lora_b_does_not_have_get_no_noise():
    model = peft_model("bert")
    module = next(module for module in model.modules() if hasattr(module, "lora_B"))
    with torch.no_grad():
        module.lora_B["default"].weight[:, 1:] = 0
    assert _layers_of(model)[0].spread.shape[1] == 1


@pytest.mark.slow
def test_the_width_is_the_largest_within_the_tolerance():
    model = confident_model()
    method = TrainingFreeBayes(model, ANCHOR, tolerance=0.05, widths=(1e-4, 1e3), steps=30)
    classes = MAP(model)(ANCHOR[0]).argmax(-1)

    def nll(predict):
        return F.nll_loss(predict(ANCHOR[0]).log(), classes).item()

    limit = 1.05 * nll(MAP(model))
    assert nll(method) <= limit
    method.width *= 1.001
    assert nll(method) > limit
    narrower = TrainingFreeBayes(model, ANCHOR, tolerance=0.01)
    assert narrower.width < method.width
    assert TrainingFreeBayes(model, ANCHOR, 0.05, widths=(1e-9, 1e-8)).width < 1.1e-8


def test_the_default_tolerance_grows_with_the_number_of_examples():
    model = peft_model("bert")
    by_hand = TrainingFreeBayes(model, ANCHOR, tolerance=0.003 * len(LENGTHS))
    assert TrainingFreeBayes(model, ANCHOR).width == by_hand.width


def test_predictions_average_samples_and_leave_the_model_alone():
    model = peft_model("bert").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = TrainingFreeBayes(model, ANCHOR, tolerance=0.2)
    p = method(BATCH)
    assert torch.equal(p, method(BATCH)) and model.training
    assert (p - MAP(model)(BATCH)).abs().max() > 1e-4
    assert (p - TrainingFreeBayes(model, ANCHOR, 0.2, seed=1)(BATCH)).abs().max() > 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in ANCHOR]
    assert TrainingFreeBayes(model, unlabelled, tolerance=0.2).width == method.width


def test_what_has_no_noise_is_refused():
    with pytest.raises(ValueError, match="anchor loader is empty"):
        TrainingFreeBayes(peft_model("bert"), [])
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    with pytest.raises(ValueError, match="train it first"):
        TrainingFreeBayes(get_peft_model(base_model("bert"), config), ANCHOR)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["word_embeddings"])
    with pytest.raises(ValueError, match=r"train it first|linear layers"):
        TrainingFreeBayes(get_peft_model(base_model("bert"), config), ANCHOR)


def test_adapters_that_would_get_no_noise_or_another_are_refused():
    """Beside linear layers: embeddings, and experts, of which each has a product of its own."""
    modules = ["query", "word_embeddings"]
    config = LoraConfig(task_type="SEQ_CLS", target_modules=modules, init_lora_weights=False)
    with pytest.raises(ValueError, match=r"linear layers; .*word_embeddings is none"):
        TrainingFreeBayes(get_peft_model(base_model("bert"), config), ANCHOR)
    with pytest.raises(ValueError, match=r"linear layers; .*experts is none"):
        TrainingFreeBayes(expert_model(), ANCHOR)


@pytest.mark.parametrize(
    "lengths", [(4, 6, 3), (3, 2, 3)]
)  # the second as long as classes are many
def test_of_token_classifiers_every_real_token_counts(lengths):
    model, batch = tagger(), tagged_batch(lengths)
    real = batch["attention_mask"].bool()
    own = MAP(model)(batch)[real]
    method = TrainingFreeBayes(model, [batch], tolerance=0.05, widths=(1e-4, 1e3), steps=30)

    def nll(p):
        return F.nll_loss(p.log(), own.argmax(-1)).item()

    assert nll(method(batch)[real]) <= 1.05 * nll(own)
    method.width *= 1.001
    assert nll(method(batch)[real]) > 1.05 * nll(own)


def test_samples_under_autocast_are_not_the_first_one_over_again():
    method = TrainingFreeBayes(peft_model("bert", dtype=torch.float32), ANCHOR, steps=1)
    method.width = 3.0
    with torch.autocast("cpu", torch.bfloat16):
        cached = method(BATCH)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(method(BATCH), cached)
