"""Pessimistic rewards against the joint covariance, one text at a time."""

import re

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from laplace_lora import KronLoraLaplace
from laplace_lora.integrations.rewards import PessimisticReward
from support.models import peft_model
from support.preferences import pair_loader
from support.texts import word_tokenizer

PROMPTS = ["a b", "c", "a b", "a b", "d"]
COMPLETIONS = [" c d", " e", " f", " g h", " a"]


@pytest.fixture(scope="module")
def la():
    la = KronLoraLaplace(peft_model("bert", num_labels=1), "reward_modeling", prior_precision=2.0)
    la.fit(pair_loader())
    return la


def encoded(texts):
    return dict(word_tokenizer()(texts, padding=True, return_tensors="pt"))


def test_deviations_are_of_differences_within_a_prompt(la):
    mean, deviation = PessimisticReward(la, word_tokenizer()).moments(PROMPTS, COMPLETIONS)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    rewards, joint = la(encoded(texts), joint=True)
    torch.testing.assert_close(mean, rewards.flatten())
    for n, same in [(0, [0, 2, 3]), (2, [0, 2, 3]), (3, [0, 2, 3])]:
        contrast = torch.zeros(len(texts), dtype=joint.dtype)
        contrast[same] -= 1 / 3
        contrast[n] += 1
        assert deviation[n] == pytest.approx(float(contrast @ joint @ contrast) ** 0.5)
    for n in (1, 4):
        assert deviation[n] == pytest.approx(float(joint[n, n]) ** 0.5)


def test_beta_trades_mean_for_deviation(la):
    mean, deviation = PessimisticReward(la, word_tokenizer()).moments(PROMPTS, COMPLETIONS)
    for beta in (0.0, 1.0, -2.0):
        reward = PessimisticReward(la, word_tokenizer(), beta, batch_size=1)
        found = reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=None)
        assert found == pytest.approx((mean - beta * deviation).tolist())
    assert reward.__name__ == "pessimistic_reward"
    assert PessimisticReward(la, word_tokenizer(), name="careful").__name__ == "careful"


def test_the_best_of_n(la):
    completions = [" c d", " e", " f"]
    reward = PessimisticReward(la, word_tokenizer(), beta=3.0)
    scores = reward(["a b"] * 3, completions)
    assert reward.best("a b", completions) == max(range(3), key=scores.__getitem__)
    with pytest.raises(ValueError, match="no completions"):
        reward.best("a b", [])


@pytest.mark.parametrize("places", [[1], [0, 1, 2]])
def test_texts_without_tokens_are_refused(la, places):
    """Alone they end in torch's own error, and among others they are rows of padding."""
    prompts, completions = ["a", "", " "], ["", "", " "]
    given = [prompts[p] for p in places], [completions[p] for p in places]
    empty = [n for n, p in enumerate(places) if p]
    with pytest.raises(ValueError, match=rf"completions {re.escape(str(empty))} have no tokens"):
        PessimisticReward(la, word_tokenizer())(*given)


def test_conversations_go_through_the_chat_template(la):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    prompt = [{"role": "user", "content": "a b"}]
    completion = [{"role": "assistant", "content": "c d"}]
    reward = PessimisticReward(la, tokenizer)
    assert reward([prompt], [completion]) == pytest.approx(reward(["a b "], ["c d "]))
    with pytest.raises(ValueError, match="both be texts"):
        reward([prompt], ["c d"])


def test_a_conversation_may_be_a_tuple(la):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    asked, said = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}
    reward = PessimisticReward(la, tokenizer)
    assert reward([(asked,)], [(said,)]) == reward([[asked]], [[said]]) != [0.0]


def test_a_conversation_begins_once(la):
    """As TRL's ``RewardTrainer`` tokenises it; a plain text's first token is the tokenizer's."""
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "h"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="h $A", special_tokens=[("h", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    prompts = [[{"role": "user", "content": content}] for content in ("a b", "c")]
    completion = [{"role": "assistant", "content": "c d"}]
    reward = PessimisticReward(la, tokenizer, beta=0.0)
    expected = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        (mean, _) = la({"input_ids": torch.tensor([ids])})
        expected.append(float(mean))
    mixed = [prompts[0], "a b", prompts[1]]
    found = reward(mixed, [completion, " c d", completion])
    assert found == pytest.approx([expected[0], expected[0], expected[1]])
    assert reward([prompts[0]] * 2, [completion] * 2) == pytest.approx([expected[0]] * 2)


def test_plain_texts_may_end_as_trl_ends_them(la):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "h"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    completions = [" c d", " e", " fh"]
    ended = ["a b c dh", "a b eh", "a b fh"]
    expected = [float(la(dict(tokenizer([text], return_tensors="pt")))[0]) for text in ended]
    reward = PessimisticReward(la, tokenizer, beta=0.0, append_eos=True)
    assert reward(["a b"] * 3, completions) == pytest.approx(expected)
    assert reward(["a b"], completions[:1]) == pytest.approx(expected[:1])
    plain = PessimisticReward(la, tokenizer, beta=0.0)
    assert plain(["a b"], completions[:1]) != pytest.approx(expected[:1])
    talk = [{"role": "user", "content": "a b"}], [{"role": "assistant", "content": "c d"}]
    assert reward([talk[0]], [talk[1]]) == plain([talk[0]], [talk[1]])
    with pytest.raises(ValueError, match=r"append_eos=True needs a tokenizer with an `eos_token`"):
        PessimisticReward(la, word_tokenizer(), append_eos=True)


def test_texts_that_would_lose_their_ends_are_refused(la):
    """All completions of a long prompt had one reward."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    reward, most = PessimisticReward(la, tokenizer, beta=0.0), "a b c d e f g h " * 2
    assert tokenizer.model_max_length == 16
    expected = float(la(dict(tokenizer([most], return_tensors="pt")))[0])
    assert reward([most[:-4]], [" g h"]) == pytest.approx([expected])
    for prompts in (["a", most, most], ["a", most, "b"]):
        places = [n for n, prompt in enumerate(prompts) if prompt == most]
        with pytest.raises(ValueError, match=rf"completions {re.escape(str(places))} have, with"):
            reward(prompts, [" c", " c", " d"])
    message = [{"role": "user", "content": most}], [{"role": "assistant", "content": "c"}]
    with pytest.raises(ValueError, match="model_max_length=16"):
        reward([message[0]], [message[1]])
    tokenizer.truncation_side = "left"
    kept = "c d e f g h a b c d e f g h c d"
    expected = float(la(dict(tokenizer([kept], return_tensors="pt")))[0])
    assert reward([most], ["c d"]) == pytest.approx([expected])


def test_what_does_not_fit_is_refused(la):
    with pytest.raises(ValueError, match="do not fit"):
        PessimisticReward(la, word_tokenizer())(["a"], [])
    other = KronLoraLaplace(peft_model("bert"), "classification")
    with pytest.raises(ValueError, match="likelihood='reward_modeling'"):
        PessimisticReward(other, word_tokenizer())


@pytest.mark.filterwarnings("ignore")  # TRL's, of its own future
def test_trls_trainer_asks_it(la, tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    reward, asked = PessimisticReward(la, word_tokenizer()), []

    def noted(prompts, completions, **kwargs):
        asked.append((prompts, completions, reward(prompts, completions, **kwargs)))
        return asked[-1][2]

    noted.__name__ = reward.__name__
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "h"
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=3,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=peft_model("llama-lm", dtype=torch.float32),
        reward_funcs=[noted],
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a b"}, {"prompt": "c d e"}]),
        processing_class=tokenizer,
    )
    trainer.train()
    ((prompts, completions, rewards),) = asked
    assert len(set(prompts)) == 1 and len(completions) == 4
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    mean = sum(rewards) / 4
    assert logged["rewards/pessimistic_reward/mean"] == pytest.approx(mean, rel=1e-4)
