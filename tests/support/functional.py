"""The functional interface and the class that it must equal, called alike."""

import torch
from torch import nn
from torch.nn import functional as F

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.functional import calculate_kronecker_factors, jacobian_mean, variance
from support.batches import loader
from support.models import TARGETS, peft_model

N_KFAC = 2
DENSE = (None, 512)
LOW = (N_KFAC, 15)
NAMES = ["llama-lm", "bert", "gpt2"]
S2 = torch.tensor(0.7, dtype=torch.float64)


def adapters_only(name, **kwargs):
    """A tiny model whose head is not trained, so that every trainable tensor is an adapter's."""
    return peft_model(name, modules_to_save=None, **kwargs)


def targets(name):
    return TARGETS if name.endswith("-lm") else None


def forward_call(name):
    ids = targets(name)
    return lambda model, batch: LogitsModel(model, target_ids=ids)(batch)


def factors_of(model, name, data=None, n_kfac=None, lr_threshold=512, keywords=("lora",), **kwargs):
    return calculate_kronecker_factors(
        model, forward_call(name), data or loader(), n_kfac, lr_threshold, keywords, **kwargs
    )


def class_of(model, name, n_kfac=None, lr_threshold=512, **kwargs):
    """The fitted class with the functional interface's options."""
    la = KronLoraLaplace(
        model,
        "classification",
        target_ids=targets(name),
        factor_rank=n_kfac,
        low_rank_threshold=lr_threshold - 1,
        residual="zero",
        prior_precision=1 / S2.item(),
        **kwargs,
    )
    la.fit(loader())
    return la


def log_likelihood(model, name, data=None):
    la = LogitsModel(model, target_ids=targets(name)).eval()
    with torch.no_grad():
        return -sum(F.cross_entropy(la(b), b["labels"], reduction="sum") for b in data or loader())


def gaussian(model, name, batch, factors, s2=S2, n_kfac=None, n_lora=2):
    """Mean and covariance of the logits by the functional interface."""
    jacobian, f_mu = jacobian_mean(model, batch, targets(name) and torch.tensor(targets(name)))
    f_var = variance(batch, jacobian, factors, s2, f_mu.shape[1], n_lora, n_kfac, "cpu")
    return f_mu, f_var


class Classifier(nn.Module):
    """Logits ``W x`` of one example with one token: here K-FAC is the GGN."""

    def __init__(self, bias=False):
        super().__init__()
        self.lora = nn.Linear(2, 2, bias=bias, dtype=torch.float64)

    def forward(self, batch):
        return self.lora(batch["x"])


def one_example(seed=0):
    torch.manual_seed(seed)
    return {"x": torch.randn(1, 2, dtype=torch.float64), "labels": torch.tensor([1])}


class Named(nn.Module):
    """Names of which one is a part of another."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(3, 3)
        self.query = nn.Linear(3, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
        self.lora_A = nn.Linear(3, 3)
        self.explorative = nn.Linear(3, 2)

    def forward(self, x):
        x = self.query(self.q(x))
        for layer in self.layers:
            x = layer(x)
        return self.explorative(self.lora_A(x))
