"""`WrappedModel`: what the model inside a `LogitsModel` takes and returns, and its vocabulary."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from laplace_lora.data.messages import FORWARD
from laplace_lora.data.sharding import unwrapped
from laplace_lora.data.steps import before_pass
from laplace_lora.models.changes.modes import device_of
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.models.head import n_rows
from laplace_lora.models.inputs.batch_checks import check_mapping, check_tensor
from laplace_lora.models.inputs.rotary import check_lengths
from laplace_lora.models.inputs.unmasked import IDS

IDS_OF = (torch.int64, torch.int32)  # that an embedding takes
OF_IMAGES = re.compile("vision|visual|image|audio")  # towers, whose positions are no text's


class WrappedModel:
    """A user's model: what it takes, how it is called, what it returns, and its vocabulary's head.

    It is no module: the `LogitsModel` around it registers the model, which must count once.

    Args:
        model: A `PeftModel`, or any module.

    Attributes:
        model: As given.
        base: The model without PEFT's wrapper, or `torch.compile`'s.
        config: Its configuration, ``None`` if it has none.
        arguments: What its forward pass takes, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base: Any = base_of(model)
        self.config: Any = getattr(self.base, "config", None)
        self.arguments = frozenset(inspect.signature(self.base.forward).parameters)

    @property
    def name(self) -> str:
        """The class of the model without PEFT's wrapper."""
        return type(self.base).__name__

    @property
    def has_prompt(self) -> bool:
        """Whether PEFT puts a prompt before a text."""
        model = self.model
        return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning

    @property
    def takes_positions(self) -> bool:
        """Whether positions may be given; PEFT drops them where it puts a prompt before a text."""
        return "position_ids" in self.arguments and not self.has_prompt

    @property
    def is_strict(self) -> bool:
        """Whether it is one of transformers' models; others may take what they like."""
        return hasattr(self.config, "model_type")

    def named(self, batch: Any) -> Any:
        """Return token ids that come as a tensor under the name that the model has for them.

        What padding is, and at which token a model answers, is read from ids in a mapping only.

        Returns:
            A mapping for integers of any shape, if the model's first input is ids; else the batch.
        """
        if not isinstance(batch, Tensor) or batch.dtype not in IDS_OF:
            return batch
        reads_ids = getattr(self.base, "main_input_name", None) == IDS and IDS in self.arguments
        return {IDS: batch} if reads_ids else batch

    def tensor(self, batch: Any) -> Tensor:
        """Return a batch that is a tensor, on the model's device.

        Args:
            batch: What is no mapping.

        Raises:
            TypeError: If it is no tensor either.
            ValueError: If it has no batch dimension, see `check_tensor`.
        """
        check_tensor(batch, self.is_strict)
        return usable(batch, device_of(self.model))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model takes of a batch, on its device.

        Raises:
            TypeError: See `check_mapping`.
            ValueError: See there, too; or if texts change each other's logits by their lengths, see
                `check_lengths`.
        """
        check_mapping(batch, self.name, self.is_strict)
        device = device_of(self.model)
        inputs = {
            key: usable(value, device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key != "labels"
        }
        if "use_cache" in self.arguments:
            inputs.setdefault("use_cache", False)
        if getattr(self.config, "return_dict", True) is False:
            inputs["return_dict"] = True  # a tuple does not name its parts
        check_lengths(self.config, inputs)
        return inputs

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """Run the model.

        Raises:
            RuntimeError: As `before_pass`.
            ValueError: If the model fails at texts that are longer than it has positions.
        """
        tokens = inputs.get(IDS)
        length = tokens.shape[-1] if isinstance(tokens, Tensor) else 0
        before_pass(FORWARD)
        with self.refusing_long_texts(length), in_turn(self.model):
            return self._run(inputs)

    @contextmanager
    def refusing_long_texts(self, tokens: int) -> Iterator[None]:
        """Say what to do where the model fails at texts that are longer than it has positions.

        Args:
            tokens: Of the texts, those in a cache included.

        Raises:
            ValueError: If it fails at such texts.
        """
        try:
            yield
        except (IndexError, RuntimeError) as error:
            limit = places_of(self.base)
            if limit is None or tokens <= limit:
                raise
            raise ValueError(
                f"the batch has {tokens} tokens, and {self.name} has positions for {limit}; "
                f"truncate the texts, tokenizer(..., truncation=True, max_length={limit}); tokens "
                "that are generated count as well"
            ) from error

    def _run(self, inputs: dict[str, Any]) -> Any:
        """Run a model that may take a mapping as its only argument, as laplace-torch's do."""
        if len(self.arguments) == 1 and not self.arguments & inputs.keys():
            kind = next(iter(inspect.signature(self.base.forward).parameters.values())).kind
            if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                return self.model(inputs)
        return self.model(**inputs)

    def logits(self, returned: Any) -> Tensor:
        """Return the logits among what the model returned.

        Raises:
            ValueError: If there are none.
        """
        logits = returned if isinstance(returned, Tensor) else getattr(returned, "logits", None)
        if isinstance(returned, Mapping):
            logits = returned.get("logits", logits)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{self.name} returned a {type(returned).__name__} without `logits`; give "
                "LogitsModel an `output` callable that makes (batch, outputs) of it"
            )
        return logits

    @property
    def vocabulary_head(self) -> Any:
        """The layer that gives the vocabulary's logits, ``None`` if it is no language model."""
        return getattr(self.base, "get_output_embeddings", lambda: None)()

    def answering_head(self) -> Any:
        """Return the vocabulary's head, from which answers are read.

        Raises:
            ValueError: If the model has none.
        """
        head = self.vocabulary_head
        if head is None:
            raise ValueError(
                f"{self.name} has no vocabulary, so `target_ids` mean nothing to it; leave them out"
            )
        return head

    @property
    def vocabulary_size(self) -> int | None:
        """Number of tokens that the model gives logits for, ``None`` if it is no language model."""
        head = self.vocabulary_head
        return None if head is None else n_rows(head)

    @property
    def adds_to_vocabulary(self) -> bool:
        """Whether the model adds a vector to the head's output, as BART does."""
        vocabulary = self.vocabulary_size
        buffers = self.base.named_buffers(recurse=False)
        return any(b.ndim and b.shape[-1] == vocabulary for _, b in buffers)


def base_of(model: nn.Module) -> nn.Module:
    """Return a model without PEFT's wrapper; not compiled, if it was before PEFT wrapped it."""
    model = unwrapped(model)
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return unwrapped(base)


def places_of(model: nn.Module) -> int | None:
    """Return for how many tokens a model has learnt positions, ``None`` if they are not learnt."""
    places = []
    for name, table in model.named_modules():
        if OF_IMAGES.search(name):
            continue
        if isinstance(table, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            # RoBERTa counts from behind its padding, OPT and BART from an offset.
            before = -1 if table.padding_idx is None else table.padding_idx
            places.append(table.num_embeddings - getattr(table, "offset", before + 1))
    return min(places, default=None)


def usable(x: Tensor, device: torch.device) -> Tensor:
    """Return an input on a device; a copy if it was made in inference mode, so has no gradient."""
    x = x.to(device)
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x
