"""Preference pairs, reward posteriors, and Jacobians of each text alone."""

import copy

import torch
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from support.batches import split_rows, token_batch
from support.models import peft_model

CHOSEN, REJECTED = (3, 6, 4, 6, 1), (5, 2, 4, 1, 7)
RELATED = ((0, 1), (1, 2), (2, 0), (1, 0), (0, 1), (3, 2), (4, 5))


def texts(lengths, seed, pad_to=None, side="right"):
    batch = token_batch(lengths, pad_to, side, seed=seed)
    return {key: value for key, value in batch.items() if key != "labels"}


def pair_batch(chosen=CHOSEN, rejected=REJECTED, seed=0, pad_to=(None, None), side="right"):
    """Pairs in TRL's names; both halves are padded to a length of their own."""
    halves = {
        "chosen": texts(chosen, 2 * seed, pad_to[0], side),
        "rejected": texts(rejected, 2 * seed + 1, pad_to[1], side),
    }
    return {f"{k}_{name}": v for name, half in halves.items() for k, v in half.items()}


def related_pairs(places=RELATED):
    """Pairs that share one text, or both in another order, with others, and one that does not."""
    texts = split_rows(token_batch((3, 6, 4, 5, 2, 4), 6))
    return [
        {
            f"{key}_{side}": texts[i][key]
            for side, i in (("chosen", a), ("rejected", b))
            for key in texts[i]
            if key != "labels"
        }
        for a, b in places
    ]


def half_of(batch, name):
    return {k.removesuffix(f"_{name}"): v for k, v in batch.items() if k.endswith(f"_{name}")}


def pair_loader(batch_size=2, batch=None, **kwargs):
    batch = pair_batch(**kwargs) if batch is None else batch
    size = len(next(iter(batch.values())))
    examples = [{key: value[n] for key, value in batch.items()} for n in range(size)]
    return DataLoader(examples, batch_size=batch_size)


def reward_posterior(cls=KronLoraLaplace, name="llama", fit=True, **kwargs):
    la = cls(peft_model(name, num_labels=1), "reward_modeling", **kwargs)
    if fit:
        la.fit(pair_loader())
    return la


def alone(batch, name, n):
    """The tokens of one text of a pair, without padding."""
    half = half_of(batch, name)
    return half["input_ids"][n : n + 1][half["attention_mask"][n : n + 1] == 1][None]


def reward_jacobians(model, batch, name):
    """Reward and its Jacobian for each text alone, by the PEFT model itself."""
    model = copy.deepcopy(model).eval()
    model.get_base_model().set_attn_implementation("eager")
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    rewards, rows = [], []
    for n in range(len(batch[f"input_ids_{name}"])):
        ids = alone(batch, name, n)

        def reward(w, ids=ids):
            return functional_call(model, w, kwargs={"input_ids": ids}).logits[0, 0]

        rewards.append(reward(weights))
        rows.append(torch.cat([j.flatten() for j in jacrev(reward)(weights).values()]))
    return torch.stack(rewards), torch.stack(rows)


def explicit_rewards(model, batch):
    """Rewards ``(batch, 2)`` and Jacobians ``(batch, 2, parameters)``, rejected first."""
    (r, J), (c, K) = (reward_jacobians(model, batch, name) for name in ("rejected", "chosen"))
    return torch.stack([r, c], 1), torch.stack([J, K], 1)


def explicit_pair_ggn(model, batch):
    """``Σ_n p(1 − p) (j_chosen − j_rejected)(…)ᵀ``."""
    f, J = explicit_rewards(model, batch)
    p = (f[:, 1] - f[:, 0]).sigmoid()
    gap = J[:, 1] - J[:, 0]
    return (gap * (p * (1 - p)).unsqueeze(1)).T @ gap
