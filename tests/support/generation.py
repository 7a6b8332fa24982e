"""Posteriors that predict tokens, and their exact moments."""

import torch

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace
from support.batches import token_batch
from support.language import language_posterior, text_loader
from support.models import TARGETS, peft_model

K = 4
FIELDS = ("map_probabilities", "probabilities", "map_log_prob", "log_prob", "entropy")
FIELDS += ("mean", "covariance", "mutual_information", "log_prob_variance")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def answers_posterior(name="llama-lm", cls=KronLoraLaplace):
    la = cls(peft_model(name), "classification", target_ids=TARGETS)
    la.fit(text_loader(2, token_batch((4, 6, 3))))
    return la


def posteriors(name):
    kinds = {
        "tokens": lambda: language_posterior(name=name, prior_precision=3.0),
        "low-rank": lambda: language_posterior(name=name, factor_rank=2, low_rank_threshold=4),
        "diagonal": lambda: language_posterior(DiagLoraLaplace, name, prior_precision=0.5),
        "answers": lambda: answers_posterior(name),
        "exact": lambda: answers_posterior(name, FullLoraLaplace),
    }
    return kinds
