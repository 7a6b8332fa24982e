"""Gradients accumulated over several steps are those of one large batch."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    Trainer,
)
from transformers.trainer_pt_utils import LabelSmoother

from laplace_lora.adaptive import IVON, IVONCallback, callbacks
from laplace_lora.adaptive.accumulated_loss import AccumulatedLoss
from support.batches import rows, token_batch
from support.models import bert_config, excite, llama_config
from support.trainers import quiet


def texts(count=4):
    batch = token_batch((4,) * count)
    return batch, batch["input_ids"]


def with_labels(make):
    batch, ids = texts()
    return {**batch, "labels": make(ids)}


def choices():
    batch, ids = texts()
    both = {key: torch.stack([batch[key], batch[key].flip(1)], 1) for key in ("input_ids",)}
    return {**both, "attention_mask": torch.ones(len(ids), 2, 4).long(), "labels": ids[:, 0] % 2}


def spans():
    batch, ids = texts()
    del batch["labels"]
    return {**batch, "start_positions": ids[:, 0] % 4, "end_positions": ids[:, 1] % 4}


CASES = {  # which of these losses ignore the number of items may change with transformers
    "classes": (BertForSequenceClassification, with_labels(lambda ids: ids[:, 0] % 2)),
    "tokens": (BertForTokenClassification, with_labels(lambda ids: ids % 2)),
    "masked": (BertForMaskedLM, with_labels(lambda ids: ids)),
    "choices": (BertForMultipleChoice, choices()),
    "spans": (BertForQuestionAnswering, spans()),
    "texts": (LlamaForCausalLM, with_labels(lambda ids: ids)),
}


def collected(name, folder, batch_size, steps, make=Trainer, scale=None, **options):
    """What IVON collected in one step."""
    cls, batch = CASES[name]
    torch.manual_seed(0)
    is_bert = cls.__name__.startswith("Bert")
    model = cls(bert_config() if is_bert else llama_config())
    targets = ["query", "value"] if is_bert else ["q_proj", "v_proj"]
    model = excite(get_peft_model(model, LoraConfig(r=2, target_modules=targets)))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    ivon = IVON(trained, ess=4, generator=torch.Generator().manual_seed(0))
    found, original = [], ivon.step

    def step(*args):
        found.extend(sums.gradients.clone() for sums in ivon.collected.values())
        return original(*args)

    ivon.step = step
    arguments = quiet(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
        seed=0,
        remove_unused_columns=False,
        **options,
    )
    data = [rows(batch, n) for n in range(4)]
    callbacks = [IVONCallback(scale)]
    make(model, arguments, train_dataset=data, callbacks=callbacks, optimizers=(ivon, None)).train()
    assert not model._forward_hooks
    return found


@pytest.mark.parametrize("name", CASES)
def test_accumulated_gradients_are_averaged(name, tmp_path):
    large = collected(name, tmp_path, 4, 1)
    for one, several in zip(large, collected(name, tmp_path, 1, 4), strict=True):
        assert torch.allclose(one, several, rtol=1e-4, atol=1e-7)


class OwnLoss(Trainer):
    """Computes each step's mean itself."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_outside_of_the_model_needs_a_scale(tmp_path):
    """Its gradients would be as many times too large as there are steps."""
    with pytest.raises(ValueError, match="give gradient_scale to the callback"):
        collected("classes", tmp_path, 1, 4, OwnLoss)
    large = collected("classes", tmp_path, 4, 1, OwnLoss)
    for one, several in zip(
        large, collected("classes", tmp_path, 1, 4, OwnLoss, 1 / 4), strict=True
    ):
        assert torch.allclose(one, several, rtol=1e-4, atol=1e-7)


class OwnLossBesideTheModels(OwnLoss):
    """Leaves the labels to the model as well, whose loss is then not what is trained."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, dict(inputs), return_outputs)


class MoreThanTheModels(Trainer):
    """Adds a term to the model's own loss, each step's mean."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.loss + 0.1 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class Divided(Trainer):
    """Has the trainer divide by the steps, whatever the model takes."""

    loss_is_scaled_for_ga = False


def test_a_loss_beside_the_models_needs_a_scale(tmp_path):
    with pytest.raises(ValueError, match="give gradient_scale to the callback"):
        collected("classes", tmp_path, 1, 4, OwnLossBesideTheModels)


@pytest.mark.parametrize("make", [MoreThanTheModels, Divided])
@pytest.mark.parametrize("name", ["classes", "texts"])
def test_what_a_trainer_makes_of_the_models_loss_is_seen(make, name, tmp_path):
    large = collected(name, tmp_path, 4, 1, make)
    for one, several in zip(large, collected(name, tmp_path, 1, 4, make), strict=True):
        assert torch.allclose(one, several, rtol=1e-4, atol=1e-7)


def test_smoothed_labels_are_averaged_where_the_trainer_counts_items(tmp_path, monkeypatch):
    smoothing = {"label_smoothing_factor": 0.1}
    monkeypatch.setattr(callbacks, "_smooths_by_items", lambda args: False)
    with pytest.raises(ValueError, match="give gradient_scale to the callback"):
        collected("classes", tmp_path, 1, 4, **smoothing)
    monkeypatch.undo()
    counts = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
    scale = None if counts else 1 / 4
    large = collected("classes", tmp_path, 4, 1, **smoothing)
    several = collected("classes", tmp_path, 1, 4, Trainer, scale, **smoothing)
    for one, other in zip(large, several, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


class Counting(torch.nn.Module):
    """A regression whose loss divides by the number of items, or ignores it."""

    def __init__(self, divides):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.divides = divides

    def forward(self, x, num_items_in_batch):
        losses = (x @ self.w).square()
        total = num_items_in_batch.sum() if self.divides else len(x)
        return {"loss": losses.sum() / total}


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("over_all", [True, False])
@pytest.mark.parametrize("kind", ["processes", "gpus"])
def test_copies_take_part_in_one_mean(kind, over_all, divides):
    """What transformers' Trainer computes in two processes, or on two devices of one."""
    model, watched = Counting(divides), AccumulatedLoss()
    data = torch.randn(2, 2, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    sizes = (1, 2) if kind == "processes" else (2, 1)
    args = SimpleNamespace(n_gpu=sizes[0], world_size=sizes[1])
    args.average_tokens_across_devices = over_all
    count = torch.tensor([12 if over_all else 6])
    watched.watch(model)
    for step in range(2):
        for copy in range(2):
            loss = model(data[step, copy], num_items_in_batch=count)["loss"]
            if over_all:
                loss = loss * 2
            # Two devices' losses are averaged before the backward pass, two processes' gradients
            # after it: the first process sees the whole of what reaches its loss.
            if kind == "gpus":
                loss = loss / 2
            loss.backward()
    gradient = model.w.grad / (2 if kind == "processes" else 1)
    model.zero_grad()
    found = gradient * watched.scale(model, args, 2)
    (data.flatten(0, 2) @ model.w).square().mean().backward()
    torch.testing.assert_close(found, model.w.grad)
