"""Experts that are modules of their own: whose tokens they see, no batch tells."""

import pytest
import torch
from torch import nn

from laplace_lora import LoraGGN
from support.references import assert_near, looped_jacobians


class Experts(nn.Module):
    """Two experts, each of which sees the tokens that are routed to it, whoever's they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleDict(
            {f"expert_{e}": nn.Sequential(nn.Linear(4, 5)) for e in (0, 1)}
        )
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, batch):
        x, routed = batch["x"], batch["routed"]
        hidden = x.new_zeros(*x.shape[:2], 5)
        for e, expert in enumerate(self.experts.values()):
            hidden[routed == e] = expert(x[routed == e]).tanh()
        return self.head(hidden.sum(1))


def routed_batch(routed):
    routed = torch.tensor(routed)
    x = torch.randn(*routed.shape, 4, generator=torch.Generator().manual_seed(0)).double()
    return {"x": x, "routed": routed, "labels": torch.arange(len(routed))}


ALONE = routed_batch([[0, 1]])  # where a row of each expert is an example
TOGETHER = routed_batch([[0, 0, 0, 1], [1, 1, 1, 0]])  # as many rows as tokens: four
ONE_SIDED = routed_batch([[0, 0, 2, 1], [1, 2, 2, 2]])  # as many rows as examples: two


def test_as_many_rows_as_examples_are_not_one_of_each():
    with pytest.raises(RuntimeError, match="belongs to an expert"):
        LoraGGN(Experts(), "classification").jacobians(ALONE)
    model = Experts()
    backend = LoraGGN(model, "classification", uncovered="diag")
    for batch in (ALONE, ONE_SIDED, TOGETHER):
        assert_near(backend.jacobians(batch)[0], looped_jacobians(model, batch))
