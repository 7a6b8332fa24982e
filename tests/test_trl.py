"""LaplaceCallback inside TRL's own trainers, with their default arguments."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from laplace_lora import KronLoraLaplace, LaplaceCallback
from support.models import peft_model
from support.references import assert_near
from support.texts import word_tokenizer

datasets = pytest.importorskip("datasets", reason="TRL's data sets are those of `datasets`")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", reason="tests of TRL's trainers need trl")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, of its own future
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


def text(length, seed):
    draws = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in draws)


def tokenizer():
    words = word_tokenizer()
    words.eos_token = "h"
    return words


def preferences(count=5, **more):
    return datasets.Dataset.from_list(
        [{"chosen": text(3 + n % 3, n), "rejected": text(4, 50 + n)} | more for n in range(count)]
    )


def texts(kind):
    if kind == "prompt-completion":
        return datasets.Dataset.from_list(
            [{"prompt": text(3, n) + " ", "completion": text(2 + n % 3, 50 + n)} for n in range(6)]
        )
    return datasets.Dataset.from_list([{"text": text(3 + n % 4, n)} for n in range(6)])


def arguments(folder, **kwargs):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    } | kwargs


def reward_trainer(folder, data, **kwargs):
    model = peft_model("llama", num_labels=1, dtype=torch.float32)
    return trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(**arguments(folder, **kwargs)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
    )


def sft_trainer(folder, data, **kwargs):
    return trl.SFTTrainer(
        model=peft_model("llama-lm", dtype=torch.float32),
        args=trl.SFTConfig(**arguments(folder, **kwargs)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
    )


def test_a_reward_trainer_with_default_arguments(tmp_path):
    trainer = reward_trainer(tmp_path, preferences())
    callback = LaplaceCallback(trainer, strict=True)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.la.likelihood == "reward_modeling" and callback.la.n_data == 5
    p = callback.predict(trainer.eval_dataset)
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert logged["eval_laplace_nll"] == pytest.approx(-p[:, 1].log().mean().item(), rel=1e-3)
    again = KronLoraLaplace.from_pretrained(trainer.model, tmp_path)
    batch = next(iter(trainer.get_eval_dataloader()))
    assert torch.equal(again.reward_difference(batch)[0], callback.la.reward_difference(batch)[0])


def test_its_batches_are_pairs_wherever_pairs_are_asked_for(tmp_path):
    trainer = reward_trainer(tmp_path, preferences(), bf16=False)
    la = KronLoraLaplace(trainer.model, "reward_modeling")
    la.fit(trainer.get_train_dataloader())
    batch = next(iter(trainer.get_eval_dataloader()))
    rows = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    pairs = {
        f"{k}_{half}": part
        for k, v in rows.items()
        for half, part in zip(("chosen", "rejected"), v.chunk(2), strict=True)
    }
    assert_near(la.reward_difference(batch), la.reward_difference(pairs), 1e-5)
    assert_near(la(batch, fitting=True), la(pairs), 1e-5)
    mean, _ = la(batch)  # single texts, where both are answered
    assert mean.shape == (len(batch["input_ids"]), 1)
    chosen, rejected = mean.squeeze(1).chunk(2)
    assert_near(la.reward_difference(batch)[0], chosen - rejected, 1e-5)
    with pytest.raises(ValueError, match="pairs are needed here"):
        la.reward_difference({k: v[:3] for k, v in rows.items()})


def test_a_trainer_without_a_likelihood_is_refused_by_name(tmp_path):
    data = [{"prompt": text(3, n), "chosen": " a b", "rejected": " c"} for n in range(4)]
    trainer = trl.DPOTrainer(
        model=peft_model("llama-lm", dtype=torch.float32),
        args=trl.DPOConfig(**arguments(tmp_path, bf16=False)),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer(),
    )
    with pytest.raises(ValueError, match=r"DPOTrainer trains by a loss.*fit a posterior"):
        LaplaceCallback(trainer)


def test_margins_are_refused_before_the_first_step(tmp_path):
    trainer = reward_trainer(tmp_path, preferences(margin=0.5))
    trainer.add_callback(LaplaceCallback(trainer))
    with pytest.raises(ValueError, match="training data: the likelihood has no margins"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("kind", "options", "examples"),
    [
        ("text", {}, 6),
        ("prompt-completion", {}, 6),
        ("text", {"packing": True, "max_length": 12}, 2),  # rows of joined texts
        ("text", {"packing": True, "max_length": 12, "packing_strategy": "wrapped"}, 3),
        ("text", {"padding_free": True, "max_length": None}, 3),
    ],
)
def test_supervised_fine_tuning(tmp_path, kind, options, examples):
    trainer = sft_trainer(tmp_path, texts(kind), bf16=False, **options)
    callback = LaplaceCallback(trainer, strict=True)
    trainer.add_callback(callback)
    trainer.train()
    la, model = callback.la, trainer.model.eval()
    assert la.likelihood == "language_modeling" and la.n_data == examples
    loss = 0.0
    with torch.no_grad():  # as the model is trained: its own forward pass
        for batch in trainer.get_train_dataloader():
            f, y = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
            loss += F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="sum").item()
    assert la.loss == pytest.approx(loss, rel=1e-5)
    assert KronLoraLaplace.from_pretrained(trainer.model, tmp_path).n_data == examples


def test_arguments_that_change_the_loss_are_pointed_out(tmp_path):
    for trainer, own in (
        (sft_trainer(tmp_path, texts("text"), bf16=False, loss_type="dft"), "loss_type='dft'"),
        (
            reward_trainer(tmp_path, preferences(), center_rewards_coefficient=0.01),
            "center_rewards_coefficient",
        ),
    ):
        with pytest.warns(UserWarning, match=f"loss is its own .{own}"):
            LaplaceCallback(trainer)


def test_texts_without_labels_of_their_own_need_their_likelihood(tmp_path):
    trainer = sft_trainer(tmp_path, texts("text"))
    trainer.add_callback(LaplaceCallback(trainer, "classification"))
    with pytest.raises(ValueError, match="training data: classification needs one integer label"):
        trainer.train()
    assert trainer.state.global_step == 0
