"""LaplaceCallback inside `transformers.Trainer`."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LaplaceCallback, LogitsModel
from support.batches import rows, token_batch
from support.models import PAD, TARGETS, peft_model
from support.preferences import alone, pair_batch, pair_loader
from support.references import assert_near
from support.streams import Stream
from support.trainers import quiet


def examples(count, seed=0, **labels):
    batch = token_batch((4,) * count, seed=seed)
    return [{**rows(batch, n), **labels} for n in range(count)]


def trainer_of(model, folder, **kwargs):
    arguments = quiet(
        folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        max_steps=3,
    )
    return Trainer(model, arguments, train_dataset=examples(10), **kwargs)


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
def test_training_ends_with_a_saved_posterior(cls, tmp_path):
    model = peft_model("bert", dtype=torch.float32)
    trainer = trainer_of(model, tmp_path, eval_dataset=examples(7, seed=1))
    callback = LaplaceCallback(trainer, posterior=cls)
    with pytest.raises(RuntimeError, match="no posterior yet"):
        callback.predict(examples(2))
    trainer.add_callback(callback)
    trainer.train()
    la = cls(model, "classification")
    la.fit(DataLoader(examples(10), batch_size=10))
    la.optimize_prior_precision()
    assert callback.la.n_data == 10
    # The trainer shuffles, and single precision moves a flat optimum more than the evidence.
    assert_near(callback.la.prior_precision, la.prior_precision, 0.02)
    la.prior_precision = callback.la.prior_precision
    la.prior_mean = callback.la.prior_mean  # the adapter's start
    assert_near(callback.la.log_marginal_likelihood(), la.log_marginal_likelihood(), 1e-4)
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    evidence = callback.la.log_marginal_likelihood().item()
    assert logged["laplace_log_marginal_likelihood"] == evidence
    knows_term = callback.la.fitted.gradient_term is not None
    assert ("laplace_corrected_log_marginal_likelihood" in logged) == knows_term
    batch = next(iter(DataLoader(examples(7, seed=1), batch_size=7)))
    p_map = LogitsModel(model).eval()(batch).softmax(-1)
    for name, p in (("laplace", callback.la(batch)), ("map", p_map)):
        expected = F.nll_loss(p.log(), batch["labels"]).item()
        assert logged[f"eval_{name}_nll"] == pytest.approx(expected, rel=1e-5)
        assert 0 <= logged[f"eval_{name}_ece"] <= 1
    again = cls.from_pretrained(model, tmp_path)
    assert_near(again(batch), callback.la(batch), 1e-4)


def test_streams(tmp_path):
    trainer = trainer_of(peft_model("bert", dtype=torch.float32), tmp_path)
    trainer.train_dataset, trainer.eval_dataset = Stream(examples(10)), Stream(examples(7, seed=1))
    callback = LaplaceCallback(trainer, strict=True)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.la.n_data == 10
    assert any("eval_laplace_nll" in entry for entry in trainer.state.log_history)
    found = callback.predict(Stream(examples(7, seed=1)))
    assert_near(found, callback.predict(examples(7, seed=1)))


def test_independent_labels_are_picked_up_from_the_problem_type(tmp_path):
    def labelled(count, seed):
        y = torch.randint(2, (count, 3), generator=torch.Generator().manual_seed(seed)).double()
        return [{**row, "labels": y[n]} for n, row in enumerate(examples(count, seed))]

    model = peft_model("bert")
    model.get_base_model().config.problem_type = "multi_label_classification"
    trainer = trainer_of(model, tmp_path, eval_dataset=labelled(7, 1))
    trainer.train_dataset = labelled(10, 0)
    callback = LaplaceCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    la = callback.la
    assert la.likelihood == "multilabel" and la.n_data == 10
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    batch = next(iter(DataLoader(labelled(7, 1), batch_size=7)))
    p_map = LogitsModel(model).eval()(batch).sigmoid()
    for name, p in (("laplace", la(batch)), ("map", p_map)):
        y = batch["labels"]
        expected = F.binary_cross_entropy(p.to(y), y).item()
        assert logged[f"eval_{name}_nll"] == pytest.approx(expected, rel=1e-5)
    assert_near(callback.predict(labelled(7, 1)), la(batch))
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert_near(again(batch), la(batch), 1e-4)


def test_the_evaluation_set_is_iterated_over_once(tmp_path):
    class Counting(Dataset):
        rows, seen = examples(7, seed=1), 0

        def __len__(self):
            return 7

        def __getitem__(self, n):
            Counting.seen += 1
            return self.rows[n]

    class Trained(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            Counting.seen = 0  # what the checks before training read does not count

    model = peft_model("bert", dtype=torch.float32)
    trainer = trainer_of(model, tmp_path, eval_dataset=Counting())
    trainer.add_callback(Trained())
    trainer.add_callback(LaplaceCallback(trainer, save=False))
    trainer.train()
    assert Counting.seen == 7


def test_predictions_stand_in_the_order_of_the_trainers(tmp_path):
    model = peft_model("bert", dtype=torch.float32)
    trainer = trainer_of(model, tmp_path)
    callback = LaplaceCallback(trainer, save=False, link_approx="bridge")
    trainer.add_callback(callback)
    trainer.train()
    data = examples(8, seed=5)
    probs = callback.predict(data)
    logits = trainer.predict(data).predictions
    assert probs.shape == logits.shape
    batch = next(iter(DataLoader(data, batch_size=8)))
    assert np.allclose(LogitsModel(model).eval()(batch).detach(), logits, atol=1e-5)
    assert_near(probs, callback.la(batch, link_approx="bridge"), 1e-4)
    assert not list(tmp_path.glob("laplace*"))


def test_a_language_model_with_answer_tokens(tmp_path):
    class Answers(Trainer):
        """Trains on the answers' logits, as a user of `target_ids` would."""

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            f = LogitsModel(model, target_ids=TARGETS)(inputs)
            return F.cross_entropy(f, inputs["labels"])

    model = peft_model("llama-lm", dtype=torch.float32)
    plain = trainer_of(model, tmp_path)
    trainer = Answers(model, plain.args, train_dataset=examples(6))
    callback = LaplaceCallback(trainer, target_ids=TARGETS)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.predict(examples(5)).shape == (5, 3)


def test_regression_gives_moments(tmp_path):
    class Squares(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return LogitsModel(model)(inputs).square().mean()

    model = peft_model("bert", dtype=torch.float32)
    plain = trainer_of(model, tmp_path)
    data = [{**e, "labels": 20 * torch.randn(3)} for e in examples(6)]
    trainer = Squares(model, plain.args, train_dataset=data, eval_dataset=data)
    callback = LaplaceCallback(trainer, "regression", save=False)
    trainer.add_callback(callback)
    trainer.train()
    assert float(callback.la.sigma_noise) > 3
    assert callback.la.tuning.method == "loo"
    mean, covariance = callback.predict(data)
    assert mean.shape == (6, 3) and covariance.shape == (6, 3, 3)
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert "laplace_log_marginal_likelihood" in logged and "eval_laplace_nll" not in logged


def test_a_given_noise_stays(tmp_path):
    trainer = trainer_of(peft_model("bert", dtype=torch.float32), tmp_path)
    trainer.train_dataset = [{**e, "labels": torch.randn(3)} for e in examples(6)]
    callback = LaplaceCallback(trainer, "regression", sigma_noise=0.7)
    callback._finish(trainer.args)
    assert float(callback.la.sigma_noise) == pytest.approx(0.7)


class RewardTrainer(Trainer):
    """TRL's loss, on the chosen texts and then the rejected ones."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = model(**inputs).logits.chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()


def test_trainer_callback(tmp_path):
    examples = [
        {f"{half}_ids": alone(pair_batch(), half, n)[0] for half in ("chosen", "rejected")}
        for n in range(5)
    ]

    def stacked(rows):
        ids = [row[f"{half}_ids"] for half in ("chosen", "rejected") for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(ids, True, PAD)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    model = peft_model("bert", num_labels=1, dtype=torch.float32)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = RewardTrainer(
        model, arguments, stacked, train_dataset=examples, eval_dataset=examples
    )
    callback = LaplaceCallback(trainer, "reward_modeling")
    trainer.add_callback(callback)
    trainer.train()
    reference = KronLoraLaplace(model, "reward_modeling")
    reference.fit(pair_loader())
    assert callback.la.n_data == 5
    reference.prior_precision = callback.la.prior_precision
    p = reference(pair_batch())
    assert_near(callback.predict(examples), p, 1e-4)
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert logged["eval_laplace_nll"] == pytest.approx(-p[:, 1].log().mean().item(), rel=1e-4)


def of_lengths(*lengths, seed=0):
    batch = token_batch(lengths, seed=seed)
    found = [rows(batch, n) for n in range(len(lengths))]
    return [
        {k: v[:n] if v.ndim else v for k, v in row.items()}
        for row, n in zip(found, lengths, strict=True)
    ]


def padded(examples):
    width = max(len(row["input_ids"]) for row in examples)

    def wide(value):
        return F.pad(value, (0, width - len(value))) if value.ndim else value

    return {name: torch.stack([wide(row[name]) for row in examples]) for name in examples[0]}


@pytest.mark.parametrize(
    "option", [{"dataloader_drop_last": True}, {"train_sampling_strategy": "group_by_length"}]
)
def test_every_row_counts_and_stands_in_its_order(tmp_path, option):
    """Trainers drop the last rows of test sets, too, and group these by length."""
    model = peft_model("bert", dtype=torch.float32)
    evaluation = of_lengths(3, 5, 4, 2, seed=1)
    trainer = trainer_of(model, tmp_path, data_collator=padded, eval_dataset=evaluation)
    for name, value in option.items():
        setattr(trainer.args, name, value)
    callback = LaplaceCallback(trainer, save=False, strict=True)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.la.n_data == 10
    data = of_lengths(3, 6, 4, 7, 5, 2, 6, 3, seed=5)
    found = callback.predict(data)
    assert_near(found, torch.cat([callback.la(padded([row])) for row in data]), 1e-5)
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    p, y = callback.la(padded(evaluation)), padded(evaluation)["labels"]
    assert logged["eval_laplace_nll"] == pytest.approx(F.nll_loss(p.log(), y).item(), rel=1e-5)
    assert all(getattr(trainer.args, name) == value for name, value in option.items())
