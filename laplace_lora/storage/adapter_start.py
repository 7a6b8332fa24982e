"""`AdapterStart`: the weights that an adapter had before training, as the mean of its prior."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from laplace_lora.adapters.plain_names import named_as, plain_names
from laplace_lora.data.sharding import whole
from laplace_lora.storage.whole_files import write_whole

FILE = "adapter_start.safetensors"


@dataclass(frozen=True)
class AdapterStart:
    """Trainable weights at the start of training.

    A prior around zero takes the random start of ``lora_A`` for something that was learnt. One
    around the start counts only how far training has moved the weights. Give it to a posterior as
    ``prior_mean``; the posterior's files hold it then.

    Attributes:
        tensors: The weights, on the CPU, by the names of the model's ``named_parameters()``.
    """

    tensors: Mapping[str, Tensor]

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``adapter_start.safetensors`` into a folder, such as the adapter's.

        Args:
            save_directory: The folder; made if missing.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, save({k: t.contiguous() for k, t in self.tensors.items()}))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> AdapterStart:
        """Read what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged.
        """
        path = Path(directory) / FILE
        try:
            return cls(load(path.read_bytes()))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def vector(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the start of some of a model's tensors, ``(numbers,)``, float64.

        Args:
            model: The model of `start_of`, or one with the same adapter, by whatever name.
            parameters: The tensors.

        Raises:
            ValueError: If a tensor's start is not known or of another shape; names it. If tensors
                are not the model's, as those of a last-layer posterior.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        own = set(names.values())
        with named_as(self.tensors):
            then = plain_names(model)
        parts = []
        for parameter in parameters:
            if id(parameter) not in names:
                raise ValueError(
                    "a last-layer posterior has a head of its own, whose start is not known; give "
                    "`prior_mean` as a number"
                )
            name = names[id(parameter)]
            start = self.tensors.get(name)
            if start is None and then(name) not in own:  # which is another adapter's, loaded beside
                start = self.tensors.get(then(name))
            if start is None or start.shape != parameter.shape:
                raise ValueError(
                    f"the start of {name!r} is not known: take start_of(model) before training, of "
                    "the same model with the same adapter"
                )
            parts.append(start.double().flatten())
        return torch.cat(parts)


def start_of(model: nn.Module) -> AdapterStart:
    """Return a copy of a model's trainable weights; call it before the first step of training.

    Args:
        model: A `PeftModel`.

    Raises:
        ValueError: If nothing is trainable.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable weights")
    return AdapterStart({k: whole(p).to("cpu", copy=True) for k, p in trainable.items()})
