"""Models that PEFT changes while they run answer threads one after the other."""

import peft
import pytest
import torch
from torch import nn

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel
from laplace_lora.models.changes.turns import changes_while_it_runs
from support.batches import loader, token_batch
from support.experts import experts_model
from support.models import TARGETS, VOCABULARY, base_model, excite, peft_model
from support.threads import beside, in_threads

START = 5


def experts():
    return KronLoraLaplace(experts_model(), "classification")


def activated():
    model = peft_model("llama-lm", task_type="CAUSAL_LM", alora_invocation_tokens=[START])
    model = excite(model, scale=0.6)
    return DiagLoraLaplace(model, "classification", target_ids=TARGETS, uncovered="diag")


def of_prompts(config):
    base = base_model("llama-lm", use_cache=False)
    model = excite(peft.get_peft_model(base, config)).double()
    return DiagLoraLaplace(model, "classification", target_ids=TARGETS, uncovered="diag")


def shadowed():
    """SHADOW seeds its small model's state before the embeddings, and uses it behind them."""
    la = of_prompts(peft.ShadowConfig(task_type="CAUSAL_LM"))
    return la, la.logits_model.model.get_base_model().model.rotary_emb


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        padding = attention_mask == 0
        x = x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.head(x[:, -1])


def attending():
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["attention"], modules_to_save=["head"])
    model = excite(peft.get_peft_model(Attending(), lora)).double()
    logits = LogitsModel(model, output=lambda returned: returned)
    la = DiagLoraLaplace(logits, "classification", uncovered="diag")
    return la, model.base_model.model.attention.get_base_layer()


def started(lengths, seed, at):
    batch = token_batch(lengths, seed=seed)
    batch["input_ids"][:, at] = START
    return batch


@pytest.mark.parametrize("make", [experts, activated])
def test_threads_get_the_answers_of_one_thread(make):
    la = make()
    la.fit(loader())
    batches = [started((4, 3, 5), 3, 1), started((6, 5, 6, 4), 4, 3)]

    def sampled():
        generator = torch.Generator().manual_seed(0)
        options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
        return la(batches[0], generator=generator, **options)

    def anew():
        other = type(la)(la.logits_model, "classification", uncovered="diag")
        other.fit(loader())
        return other(batches[0])

    jobs = [*(lambda x=x: la(x) for x in batches), sampled, anew]
    expected = [job() for job in jobs]
    names = [name for name, _ in la.logits_model.named_modules()]
    results, errors = in_threads(jobs)
    assert not errors, errors[0]
    for mine, alone in zip(results, expected, strict=True):
        assert all(torch.equal(result, alone) for result in mine)
    assert [name for name, _ in la.logits_model.named_modules()] == names


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # as SHADOW passes them
@pytest.mark.parametrize("make", [shadowed, attending])
def test_a_thread_waits_for_one_inside_the_model(make):
    la, module = make()
    la.fit(loader())
    x, y = token_batch((4, 3, 5), seed=3), token_batch((5, 5, 2), seed=4)
    expected = [la(x), la(y)]
    names = [name for name, _ in la.logits_model.named_parameters()]
    for found, alone in zip(beside(module, lambda: la(x), lambda: la(y)), expected, strict=True):
        assert isinstance(found, torch.Tensor), found
        assert torch.equal(found, alone)
    assert torch.equal(la(x), expected[0])
    assert [name for name, _ in la.logits_model.named_parameters()] == names


def test_the_memory_of_a_prompt_stays_while_a_thread_reads_it():
    """Each pass of CPT puts other memory under its weights."""
    tokens = {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}
    la = of_prompts(peft.CPTConfig(task_type="CAUSAL_LM", **tokens))
    la.fit(loader())
    x, seen = token_batch((4, 3)), []
    embedding = la.logits_model.model.prompt_encoder["default"].delta_embedding
    embedding.register_forward_pre_hook(lambda *_: seen.append(embedding.weight.data_ptr()))
    embedding.register_forward_hook(lambda *_: seen.append(embedding.weight.data_ptr()))
    beside(embedding, lambda: la(x), lambda: la(x))
    assert seen[::2] == seen[1::2] and len(set(seen)) > 1


def test_an_adapter_that_comes_later_counts():
    lora = {"r": 2, "modules_to_save": ["head"]}
    model = peft.get_peft_model(Attending(), peft.LoraConfig(target_modules=["embedding"], **lora))
    assert not changes_while_it_runs(model)
    model.add_adapter("other", peft.LoraConfig(target_modules=["attention"], **lora))
    assert changes_while_it_runs(LogitsModel(model))


def test_other_models_wait_for_nobody():
    assert changes_while_it_runs(experts().logits_model)
    assert changes_while_it_runs(activated().logits_model)
    assert not changes_while_it_runs(peft_model("bert"))
    assert not changes_while_it_runs(torch.nn.Linear(2, 2))
