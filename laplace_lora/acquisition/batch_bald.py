"""BatchBALD: the examples whose labels together tell most about the weights."""

from __future__ import annotations

import torch
from torch import Tensor

CONFIGURATIONS = 1024  # of chosen labels that are looked at
AT_ONCE = 2**24  # numbers


def batch_bald(
    log_p: Tensor, n: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Choose examples greedily by the joint mutual information of their labels with the weights.

    Source: Kirsch, van Amersfoort, Gal (2019), arXiv:1906.08158. An example's gain is
    ``I(y; θ | labels chosen before) = E_m[H(p(y | m))] − E_θ[H(p(y | θ))]`` over configurations
    ``m`` of the labels chosen before: all of them, or as many as `CONFIGURATIONS`, drawn from their
    distribution.

    ``S`` samples hold at most ``ln S`` nats: once the labels that are chosen hold ``I``, about
    ``S e^-I`` samples still count.

    Args:
        log_p: Log probabilities under samples of the weights, ``(samples, examples, classes)``.
        n: How many to choose.
        generator: Source of the configurations that are drawn.

    Returns:
        Places of the chosen, ``(n,)``, in the order of the choice, and the gain of each in nats.
    """
    p = log_p.double().exp()
    samples, examples, classes = p.shape
    own = torch.special.entr(p).sum(-1).mean(0)
    # How likely each sample of the weights is given a configuration, times the samples.
    given = p.new_ones(samples, 1)
    weights = p.new_ones(1)
    free = torch.ones(examples, dtype=torch.bool, device=p.device)
    chosen, gains = [], []
    step = max(1, AT_ONCE // (len(weights) * CONFIGURATIONS * classes))
    for _ in range(n):
        expected = torch.cat(
            [
                torch.special.entr(_next(given, part)).sum(-1) @ weights
                for part in p.split(step, dim=1)
            ]
        )
        gain = (expected - own).masked_fill(~free, -torch.inf)
        best = int(gain.argmax())
        chosen.append(best)
        gains.append(gain[best])
        free[best] = False
        labels = _next(given, p[:, best : best + 1])[0]
        joint = (weights.unsqueeze(1) * labels).flatten()
        posterior = given.unsqueeze(2) * p[:, best].unsqueeze(1) / labels.clamp(min=1e-300)
        given, weights = posterior.flatten(1), joint
        if len(weights) > CONFIGURATIONS:
            drawn = torch.multinomial(weights, CONFIGURATIONS, True, generator=generator)
            given = given[:, drawn]
            weights = weights.new_full((CONFIGURATIONS,), 1 / CONFIGURATIONS)
    return torch.tensor(chosen), torch.stack(gains).cpu()


def _next(given: Tensor, p: Tensor) -> Tensor:
    """Return the probabilities of examples' labels, ``(examples, configurations, classes)``."""
    return torch.einsum("sm,snc->nmc", given, p) / len(given)
