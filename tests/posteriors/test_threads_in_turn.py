"""Models that PEFT changes while they run answer threads one after the other."""

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.models.changes.turns import changes_while_it_runs
from support.batches import loader, token_batch
from support.experts import experts_model
from support.models import TARGETS, excite, peft_model
from support.threads import in_threads

START = 5


def experts():
    return KronLoraLaplace(experts_model(), "classification")


def activated():
    model = peft_model("llama-lm", task_type="CAUSAL_LM", alora_invocation_tokens=[START])
    model = excite(model, scale=0.6)
    return DiagLoraLaplace(model, "classification", target_ids=TARGETS, uncovered="diag")


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


def test_other_models_wait_for_nobody():
    assert changes_while_it_runs(experts().logits_model)
    assert changes_while_it_runs(activated().logits_model)
    assert not changes_while_it_runs(peft_model("bert"))
    assert not changes_while_it_runs(torch.nn.Linear(2, 2))
