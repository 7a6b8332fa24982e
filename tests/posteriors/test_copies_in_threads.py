"""Copies that are made while another thread is predicting have nothing of its prediction."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch

from laplace_lora import KronLoraLaplace, KronLoraLLLaplace, LogitsModel
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.changes.narrowing import one_token, rows_only
from support.batches import loader, token_batch
from support.models import TARGETS, peft_model

BATCH = token_batch((4, 2, 5), seed=3)


@contextmanager
def predicting(model):
    """Let another thread be in the middle of a prediction; yields how to let it run a function."""
    inside, asked, answered = threading.Event(), threading.Event(), threading.Event()
    jobs, results = [], []
    head = model.model.get_output_embeddings()

    def predict():
        with evaluation_mode(model), one_token(head, None), rows_only(head, model.target_ids):
            inside.set()
            asked.wait()
        results.append(jobs[0]() if jobs else None)
        answered.set()

    def finish(job):
        jobs.append(job)
        asked.set()
        answered.wait()
        return results[0]

    thread = threading.Thread(target=predict)
    thread.start()
    inside.wait()
    try:
        yield finish
    finally:
        asked.set()
        thread.join()


def hooks(la):
    modules = [*la.model.modules(), *la.logits_model.modules()]
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]


@pytest.mark.parametrize("cls", [KronLoraLaplace, KronLoraLLLaplace])
def test_a_posteriors_copy_has_the_modes_and_hooks_of_no_prediction(cls):
    model = LogitsModel(peft_model("llama-lm"), target_ids=TARGETS).train()
    la = cls(model, "classification")
    la.fit(loader())
    expected, before = la(BATCH), hooks(la)
    with predicting(model) as finish:
        twin = copy.deepcopy(la)
        copied = twin.logits_model
        assert all(module.training for module in copied.modules())
        assert hooks(twin) == before != hooks(la)
        assert torch.equal(finish(lambda: twin(BATCH)), expected)
    assert not any("forward" in vars(module) for module in copied.modules())
    assert all(module.training for module in model.modules())


def test_a_models_copy_runs_as_ever_in_the_thread_that_was_predicting():
    model = LogitsModel(peft_model("llama-lm"), target_ids=TARGETS).eval()
    inputs = {k: v for k, v in BATCH.items() if k != "labels"}
    with torch.no_grad():
        expected = model.model(**inputs).logits

    @torch.no_grad()
    def plain(copied):
        return copied(**inputs).logits

    with predicting(model) as finish:
        copied = copy.deepcopy(model.model)
        assert torch.equal(finish(lambda: plain(copied)), expected)
