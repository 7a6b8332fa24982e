"""What the processes of a training share of IVON's draws.

Either all draw the same weights, or they add up what each collected at its own.
"""

from __future__ import annotations

import torch

from laplace_lora.adaptive.weight_posterior import CollectedGradients, WeightPosterior
from laplace_lora.data.distributed import together


def share_draws(posterior: WeightPosterior, step: int) -> None:
    """Give an optimiser a generator that draws the same in all processes, unless it has its own.

    `DistributedDataParallel` averages gradients, which therefore must have been computed at the
    same weights. The global generators do not stay together: dropout moves them by the sizes of
    what each process sees.

    Args:
        posterior: The optimiser.
        step: At which step training begins. A resumed one would repeat the draws of its first steps
            with a seed that is the same at each.

    Raises:
        ValueError: If the optimiser's own generators draw differently.
    """
    with together(everyone=True) as team:
        if not team.shared:
            return
        own = posterior.generator
        states = team.all_of(None if own is None else own.get_state().cpu().tolist())
        if any(state != states[0] for state in states):
            raise ValueError(
                "the processes' generators differ, but gradients that are averaged over processes "
                "must be computed at the same weights: give each IVON a generator with the same "
                "seed, or none"
            )
        if own is None:
            seed, *_ = team.all_of(int(torch.randint(2**31, ())))
            device = posterior.param_groups[0]["params"][0].device
            posterior.generator = torch.Generator(device).manual_seed(seed + step)


def add_up(posterior: WeightPosterior) -> None:
    """Take in what the other processes collected at draws of their own."""
    with together(everyone=True) as team:
        parameters = [p for _, p in posterior.trainable()]
        uses = [float(p in posterior.collected) for p in parameters]
        sums = [
            posterior.collected.get(p)
            or CollectedGradients(
                *torch.zeros(2, *p.shape).to(posterior.weight_state(group, p)["hessian"])
            )
            for group, p in posterior.trainable()
        ]
        team.add_up([tensor for each in sums for tensor in (each.gradients, each.products)])
        draws, *uses = team.total(posterior.draws, *uses)
    posterior.draws = int(draws)
    used = zip(parameters, sums, uses, strict=True)
    posterior.collected = {p: each for p, each, use in used if use}
