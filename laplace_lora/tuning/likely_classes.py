"""`LikelyClasses`: of many classes, those between which an example is in doubt.

Leave-one-out works in the space of examples × contrasts, which many classes make too large. That a
label is what it is, known to be one of a few classes, has a likelihood of its own: the softmax of
their logits. An example keeps its own label and the classes that the network takes for the
likeliest others, which are nearly all that its curvature is about.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import Readout


class LikelyClasses:
    """Contrasts of a batch's labels to their likeliest rivals; choose before each batch is read.

    Args:
        rivals: How many of them an example has.

    Attributes:
        readout: The contrasts ``f_rival − f_label`` of the batch that was chosen for, in every
            model. The label stands first, so all examples have the label 0.
    """

    def __init__(self, rivals: int) -> None:
        self.rivals = rivals
        self.readout = Readout(
            self._columns, self._values, is_softmax=True, relative=True, label_first=True
        )
        self._chosen = torch.empty(0, 1 + rivals, dtype=torch.long)

    def choose(self, outputs: Tensor, labels: Tensor) -> None:
        """Choose the classes of a batch.

        Args:
            outputs: Logits of the trained network, ``(batch, classes)``.
            labels: Shape ``(batch,)``.
        """
        own = labels.unsqueeze(-1)
        others = outputs.scatter(-1, own, -torch.inf).topk(self.rivals, dim=-1).indices
        self._chosen = torch.cat([own, others], dim=-1)

    def _values(self, outputs: Tensor) -> Tensor:
        logits = outputs.gather(-1, self._chosen)
        return logits[:, 1:] - logits[:, :1]

    def _columns(self, outputs: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(self._chosen, outputs.shape[-1]).to(outputs)
        return (one_hot[:, 1:] - one_hot[:, :1]).transpose(0, 1)
