"""LaplaceCallback on a token classifier."""

import pytest
import torch
from transformers import Trainer

from laplace_lora import LaplaceCallback
from laplace_lora.likelihoods.language_modeling import IGNORED
from support.batches import rows
from support.tokens import tagged_batch, tagger
from support.trainers import quiet


def test_a_token_classifier_is_recognised_predicted_and_scored(tmp_path):
    batch, evaluation = tagged_batch((4, 6, 3, 5)), tagged_batch((5, 4, 6), seed=1)
    arguments = quiet(
        tmp_path,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=2,
    )
    data = ([rows(part, n) for n in range(len(part["labels"]))] for part in (batch, evaluation))
    train, validation = data
    model = tagger(dtype=torch.float32)
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=validation)
    callback = LaplaceCallback(trainer, strict=True)
    assert callback.likelihood == "token_classification"
    trainer.add_callback(callback)
    trainer.train()
    counted = evaluation["labels"] != IGNORED
    p = callback.predict(validation)
    assert p.shape == (3, 6, 3)
    expected = -p[counted][range(int(counted.sum())), evaluation["labels"][counted]].log().mean()
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert logged["eval_laplace_nll"] == pytest.approx(float(expected), rel=1e-4)
    assert logged["eval_map_nll"] != logged["eval_laplace_nll"]
