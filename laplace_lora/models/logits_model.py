"""`LogitsModel`: any fine-tuned transformer as a function from a batch to ``(batch, outputs)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from laplace_lora.adapters.peft_state import activate_adapter
from laplace_lora.data.pairs import is_pair, passes
from laplace_lora.models.last_layer_model import head_tensors, last_linear, n_rows
from laplace_lora.models.modes import device_of
from laplace_lora.models.narrowing import last_true, one_token, rows_only
from laplace_lora.models.positions import PositionRule
from laplace_lora.models.thread_hooks import on_input, on_output


class LogitsModel(nn.Module):
    """A model from a batch to logits or regression means, ``(batch, outputs)``.

    It takes what a Hugging Face collator yields (a mapping) or a tensor, moves tensors to the
    model's device and drops ``labels``. Half-precision logits are returned in float32.

    * Sequence classification and regression: the model's own logits. A decoder's ``score`` head is
      run at the one token whose logits the model keeps, not at all of them.
    * Causal language model with ``target_ids``: the logits of these answer tokens after the last
      real token, with padding on either side; the vocabulary's other rows and the other tokens
      never go through the head. Positions count real tokens only, as in generation.
    * Encoder-decoder with ``target_ids``: the same at the first decoder step.
    * Anything else through ``output``.
    * A reward model, which has one output, on pairs (see `preferences`): both rewards.

    Args:
        model: A `PeftModel`, or any module. An adapter loaded for inference is made trainable.
        target_ids: Vocabulary indices of the answers, in the order of the labels.
        output: Maps what the model returns to logits ``(batch, outputs)``.

    Raises:
        ValueError: If ``target_ids`` are fewer than two, repeated, outside the vocabulary or given
            together with ``output``, or the model has no vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        target_ids: Sequence[int] | Tensor | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self._base: Any
        self.target_ids: Tensor | None
        # Kept out of the module tree: it is part of `model` and would be registered twice.
        object.__setattr__(
            self, "_base", model.get_base_model() if isinstance(model, PeftModel) else model
        )
        self.config: Any = getattr(self._base, "config", None)
        self._arguments = frozenset(inspect.signature(self._base.forward).parameters)
        prompts = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        self._positions = PositionRule("position_ids" in self._arguments and not prompts)
        activate_adapter(model)
        ids = None
        if target_ids is not None:
            if output is not None:
                raise ValueError("give either `target_ids` or `output`, not both")
            ids = _checked_target_ids(target_ids, self._vocabulary_head()).to(self.device)
        self.register_buffer("target_ids", ids, persistent=False)

    @classmethod
    def wrap(
        cls, model: nn.Module, target_ids: Sequence[int] | Tensor | None = None
    ) -> LogitsModel:
        """Return a `LogitsModel` around a model, or the model itself if it is one already.

        Args:
            model: A `PeftModel`, any module, or a `LogitsModel`.
            target_ids: Answer tokens, only for a model that is not wrapped yet.

        Raises:
            ValueError: If a `LogitsModel` comes with ``target_ids``, and as the constructor.
        """
        if not isinstance(model, LogitsModel):
            return cls(model, target_ids=target_ids)
        if target_ids is not None:
            raise ValueError("the model is a LogitsModel already; give it the `target_ids`")
        return model

    @property
    def device(self) -> torch.device:
        """Where inputs go and outputs come from, see `device_of`."""
        return device_of(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder; answers are read at its first decoder step."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def vocabulary_size(self) -> int | None:
        """Number of tokens that the model gives logits for, ``None`` if it is no language model."""
        head = self._output_embeddings()
        return None if head is None else n_rows(head)

    @property
    def n_outputs(self) -> int | None:
        """Logits or regression means per example, ``None`` where only a batch can tell."""
        if self.output is not None:
            return None
        if self.target_ids is not None:
            return len(self.target_ids)
        return getattr(self.config, "num_labels", None)

    def forward(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """Return logits or regression means.

        Args:
            batch: A mapping with the model's inputs (``labels`` are ignored), or a tensor.

        Returns:
            Shape ``(batch, outputs)``, float32 or better. For pairs ``(batch, 2)``, the rewards of
            the rejected and of the chosen texts.

        Raises:
            ValueError: If a batch of pairs meets a model with several outputs, or lacks a half.
        """
        if is_pair(batch):
            rewards = torch.cat([self(half) for half in passes(batch)], dim=-1)
            if rewards.shape[-1] != 2:
                raise ValueError(
                    f"a reward model has one output, this one {rewards.shape[-1] // 2}; load it "
                    "with num_labels=1"
                )
            return rewards
        if isinstance(batch, Mapping):
            logits = self._from_mapping(self._inputs(batch))
        else:
            logits = self._logits(self.model(batch.to(self.device)))
        return wide(logits.to(self.device))  # a model may be spread over devices

    def own_logits(self, batch: Mapping[str, Any] | Tensor) -> Tensor | None:
        """Return the logits that the model itself gives for a batch, ``None`` if ours are these.

        The model runs as a whole, at all tokens and for all of the vocabulary, and counts positions
        by itself.

        Args:
            batch: As for `forward`.
        """
        if not isinstance(batch, Mapping) or self.output is not None:
            return None
        if is_pair(batch):
            rewards = [self.own_logits(half) for half in passes(batch)]
            return torch.cat([reward for reward in rewards if reward is not None], dim=-1)
        inputs = self._inputs(batch)
        if self.target_ids is None:
            logits = self._logits(self.model(**inputs))
        else:
            mask = self._answer_mask(inputs)
            logits = self.model(**inputs).logits
            after = -1 if mask is None else last_true(mask) + logits.shape[1] - mask.shape[1]
            rows = torch.arange(len(logits), device=logits.device)
            at = torch.as_tensor(after, device=logits.device)
            logits = logits[rows, at][:, self.target_ids.to(logits.device)]
        return wide(logits.to(self.device))

    def features(self, batch: Mapping[str, Any] | Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last linear layer sees, and the logits.

        Args:
            batch: As for `forward`.

        Returns:
            Features ``(batch, d)`` at the position that the model itself uses, and logits
            ``(batch, outputs)``.

        Raises:
            ValueError: If the model has no linear last layer.
            RuntimeError: If that layer did not run once per example.
        """
        seen: list[Tensor] = []
        hook = on_output(self._linear_head(), lambda args, kwargs, out: seen.append(args[0]))
        try:
            logits = self(batch)
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0].numel() != len(logits) * seen[0].shape[-1]:
            raise RuntimeError(
                "the last linear layer did not run once per example: "
                f"{[tuple(x.shape) for x in seen]} for logits {tuple(logits.shape)}"
            )
        return seen[0].reshape(len(logits), -1), logits

    def head_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(outputs, d)`` and bias of the last layer; of the answers' rows only.

        Raises:
            ValueError: If there is no linear last layer, or it is quantised or offloaded.
        """
        return head_tensors(self._linear_head(), self.target_ids)

    def _linear_head(self) -> Any:
        if self.target_ids is not None:
            return self._vocabulary_head()
        return last_linear(self._base, getattr(self.config, "num_labels", None))

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the transformer takes, on its device."""
        inputs = {
            key: value.to(self.device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key != "labels"
        }
        if "use_cache" in self._arguments:
            inputs.setdefault("use_cache", False)
        return inputs

    def _count_real_tokens(self, inputs: dict[str, Any]) -> None:
        """Let positions count real tokens only, as in generation, see `PositionRule`."""
        self._positions.apply(inputs, lambda x: self.model(**x).logits, not self.model.training)

    def _from_mapping(self, inputs: dict[str, Any]) -> Tensor:
        if self.target_ids is not None:
            return self._answer_logits(inputs, self.target_ids)
        head = self._score_head(inputs)
        if head is None:
            return self._logits(self.model(**inputs))
        # The decoder picks the token by the ids that it receives itself. Prompt tuning hands it
        # embeddings instead, of a longer text.
        received = {"input_ids": inputs["input_ids"]}

        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            received["input_ids"] = kwargs.get("input_ids", args[0] if args else None)

        def position() -> Tensor | None:
            return _last_unpadded(received["input_ids"], self.config)

        handle = on_input(self._base, note)
        try:
            with one_token(head, position, keep_length=True):
                return self._logits(self.model(**inputs))
        finally:
            handle.remove()

    def _logits(self, returned: Any) -> Tensor:
        if self.output is not None:
            return self.output(returned)
        return returned if isinstance(returned, Tensor) else returned.logits

    def _answer_mask(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return which tokens are real where answers are read; makes the first decoder step."""
        if not self.is_encoder_decoder:
            return inputs.get("attention_mask")
        start = self.config.decoder_start_token_id
        first = inputs["input_ids"].new_full((len(inputs["input_ids"]), 1), start)
        inputs.setdefault("decoder_input_ids", first)
        return inputs.get("decoder_attention_mask")

    def _answer_logits(self, inputs: dict[str, Any], ids: Tensor) -> Tensor:
        mask = self._answer_mask(inputs)
        if not self.is_encoder_decoder:
            self._count_real_tokens(inputs)
        head = self._vocabulary_head()
        position = None if mask is None else last_true(mask)
        length = None if mask is None else mask.shape[1]
        with one_token(head, position, length=length), rows_only(head, ids) as narrowed:
            logits = self.model(**inputs).logits[:, -1]
        return logits if narrowed else logits[:, ids.to(logits.device)]

    def _output_embeddings(self) -> Any:
        return getattr(self._base, "get_output_embeddings", lambda: None)()

    def _vocabulary_head(self) -> Any:
        head = self._output_embeddings()
        if head is None:
            raise ValueError(
                f"{type(self._base).__name__} has no vocabulary, so `target_ids` mean nothing to "
                "it; leave them out"
            )
        return head

    def _score_head(self, inputs: dict[str, Any]) -> nn.Module | None:
        """Return the head of a decoder that classifies at its last unpadded token."""
        classifier = type(self._base).__name__.endswith("ForSequenceClassification")
        known = classifier and not self.is_encoder_decoder and "input_ids" in inputs
        return getattr(self._base, "score", None) if known else None


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32 or better."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _checked_target_ids(target_ids: Sequence[int] | Tensor, head: Any) -> Tensor:
    ids = torch.as_tensor(target_ids)
    vocabulary = n_rows(head)
    if ids.ndim != 1 or len(ids) < 2 or ids.is_floating_point() or len(ids.unique()) != len(ids):
        raise ValueError(f"`target_ids` must be two or more different integers, got {target_ids}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"`target_ids` must lie in the vocabulary, 0..{vocabulary - 1}; got {ids.tolist()}"
        )
    return ids


def _last_unpadded(input_ids: Tensor | None, config: Any) -> Tensor | None:
    """Return the token at which transformers' decoders classify: the last that is not padding.

    ``None`` for the last of all, which they take where there are no ids.
    """
    pad = config.get_text_config().pad_token_id
    return None if pad is None or input_ids is None else last_true(input_ids != pad)
