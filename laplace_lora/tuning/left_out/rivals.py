"""`Rivals`: of many classes, some that an example's label is told apart from.

Leave-one-out works in the space of examples × contrasts, which many classes make too large. That a
label is what it is, known to be one of a few classes, has a likelihood of its own: the softmax of
their logits. It is one as long as each of these classes could have been the label and been met by
the same others, so that they give away nothing. Rivals drawn at random do not. The classes that the
network takes for the likeliest do: a label among them that it does not expect stands out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.base import Readout
from laplace_lora.tuning.left_out.linear_model import LinearModel, Loss

SEED = 0


class Rivals:
    """Contrasts of a batch's labels to other classes; draw these before each batch is read.

    Args:
        classes: How many there are.
        count: How many rivals an example has.

    Attributes:
        readout: The contrasts ``f_rival − f_label`` of the batch that was drawn for, in every
            model. The label stands first, so all examples have the label 0.
        noting: The same; `shares` keeps how probable the model that is read takes these classes to
            be, all together.
        shares: Of each batch that was read by `noting`, ``(batch,)`` in float64.
    """

    def __init__(self, classes: int, count: int) -> None:
        self.classes, self.count = classes, count
        self.readout = Readout(
            self._columns, self._values, is_softmax=True, relative=True, label_first=True
        )
        self.noting = replace(self.readout, mean=self._noted)
        self.shares: list[Tensor] = []
        self._source = torch.Generator().manual_seed(SEED)
        self._chosen = torch.empty(0, 1 + count, dtype=torch.long)

    def draw(self, labels: Tensor) -> None:
        """Draw the rivals of a batch's labels, ``(batch,)``."""
        others = [torch.randperm(self.classes - 1, generator=self._source) for _ in labels]
        drawn = torch.stack(others)[:, : self.count].to(labels.device)
        own = labels.unsqueeze(-1)
        self._chosen = torch.cat([own, drawn + (drawn >= own)], dim=-1)

    def _values(self, outputs: Tensor) -> Tensor:
        logits = outputs.gather(-1, self._chosen)
        return logits[:, 1:] - logits[:, :1]

    def _noted(self, outputs: Tensor) -> Tensor:
        p = outputs.detach().double().softmax(-1)
        self.shares.append(p.gather(-1, self._chosen).sum(-1))
        return self._values(outputs)

    def _columns(self, outputs: Tensor) -> Tensor:
        one_hot = F.one_hot(self._chosen, outputs.shape[-1]).to(outputs)
        return (one_hot[:, 1:] - one_hot[:, :1]).transpose(0, 1)


def loss_among(functions: LinearModel, count: int) -> Loss:
    """Return the summed loss of labels that are told apart from rivals alone, in a model's unit.

    Args:
        functions: Contrasts of all classes to the first, of labelled examples.
        count: How many rivals an example has; 0 for all.
    """
    if not count:
        return functions.nll
    rivals = Rivals(functions.offset.shape[1] + 1, count)
    rivals.draw(functions.labels)
    first = torch.zeros_like(functions.labels)

    def loss(outputs: Tensor) -> float:
        contrasts = rivals.readout.mean(F.pad(outputs, (1, 0)))
        log_p = rivals.readout.log_softmax(contrasts)
        return functions.scale * float(F.nll_loss(log_p, first, reduction="sum"))

    return loss
