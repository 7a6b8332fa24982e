"""`LogitsModel`: any fine-tuned transformer as a function from a batch to ``(batch, outputs)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.activation import activate_adapter
from laplace_lora.data.distributed import check_runs_same_data
from laplace_lora.data.messages import FORWARD
from laplace_lora.data.pairs import is_pair, passes
from laplace_lora.data.sharding import refuse_tensor_parallel, unwrapped
from laplace_lora.data.steps import before_pass
from laplace_lora.likelihoods.reward_modeling import RewardModeling
from laplace_lora.models.answers import AnswerPlace, checked_target_ids
from laplace_lora.models.changes.modes import coarsest_dtype, device_of
from laplace_lora.models.changes.narrowing import at_position, one_token, rows_only
from laplace_lora.models.head import head_tensors, last_linear, n_rows, seen_by_head
from laplace_lora.models.inputs.batch_checks import CHOOSING, check_has_texts
from laplace_lora.models.inputs.positions import PositionRule
from laplace_lora.models.score_head import score_head_narrowed
from laplace_lora.models.wrapped_model import WrappedModel


class LogitsModel(nn.Module):
    """A model from a batch to logits or regression means, ``(batch, outputs)``.

    It takes what a Hugging Face collator yields (a mapping) or a tensor, moves tensors to the
    model's device and drops ``labels``. Half-precision logits are returned in float32.

    * Sequence classification and regression: the model's own logits. A decoder's ``score`` head is
      run at the one token whose logits the model keeps, not at all of them.
    * Multiple choice: the logits of the choices, ``(batch, choices)``.
    * Causal language model with ``target_ids``: the logits of these answer tokens after the last
      real token, with padding on either side; the vocabulary's other rows and the other tokens
      never go through the head. Positions count real tokens only, as in generation.
    * Encoder-decoder with ``target_ids``: the same at the first decoder step, or, where the answer
      comes later as BART's does, after the batch's ``decoder_input_ids``.
    * Masked language model with ``target_ids``: the same at the mask token, one per text.
    * Anything else through ``output``.
    * A reward model, which has one output, on pairs (see `data.pairs`): both rewards.

    Args:
        model: A `PeftModel`, which is made trainable if it was loaded for inference, or any module.
        target_ids: Vocabulary indices of the answers, in the order of the labels.
        output: Maps what the model returns to logits ``(batch, outputs)``.
        mask_token_id: Where a masked language model answers, if its configuration does not say.

    Raises:
        ValueError: If ``target_ids`` are fewer than two, repeated, outside the vocabulary or given
            together with ``output``, the model has no vocabulary, or a mask token is given to one
            that is no masked language model with ``target_ids``.
    """

    def __init__(
        self,
        model: nn.Module,
        target_ids: Sequence[int] | Tensor | None = None,
        output: Callable[[Any], Tensor] | None = None,
        mask_token_id: int | None = None,
    ) -> None:
        super().__init__()
        model = unwrapped(model)
        refuse_tensor_parallel(model)
        self.model = model
        self.output = output
        self._wrapped = WrappedModel(model)
        self.config: Any = self._wrapped.config
        self._positions = PositionRule(self._wrapped.takes_positions)
        self._answer = AnswerPlace(self._wrapped.base, mask_token_id)
        self.mask_token_id = mask_token_id
        activate_adapter(model)
        self.target_ids: Tensor | None
        ids = None
        if mask_token_id is not None:
            self._answer.check_reads_mask_token(target_ids)
        if target_ids is not None:
            if output is not None:
                raise ValueError("give either `target_ids` or `output`, not both")
            rows = n_rows(self._wrapped.answering_head())
            ids = checked_target_ids(target_ids, rows).to(self.device)
        self.register_buffer("target_ids", ids, persistent=False)

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        target_ids: Sequence[int] | Tensor | None = None,
        mask_token_id: int | None = None,
    ) -> LogitsModel:
        """Return a `LogitsModel` around a model, or the model itself if it is one already.

        Args:
            model: A `PeftModel`, any module, or a `LogitsModel`.
            target_ids: Answer tokens, only for a model that is not wrapped yet.
            mask_token_id: Where a masked language model answers, likewise.

        Raises:
            TypeError: If it is no module.
            ValueError: If a `LogitsModel` comes with either of them, and as the constructor.
        """
        model = unwrapped(model)
        if not isinstance(model, LogitsModel):
            return cls(model, target_ids=target_ids, mask_token_id=mask_token_id)
        if target_ids is not None:
            raise ValueError("the model is a LogitsModel already; give it the `target_ids`")
        if mask_token_id is not None:
            raise ValueError("the model is a LogitsModel already; give it the `mask_token_id`")
        return model

    @property
    def device(self) -> torch.device:
        """Where inputs go and outputs come from, see `device_of`."""
        return device_of(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder, whose answers its decoder gives."""
        return self._answer.is_encoder_decoder

    @property
    def answers_behind_texts(self) -> bool:
        """Whether an answer is the token that follows a text, so that nothing may end the text."""
        return self.target_ids is not None and self._answer.follows_text

    @property
    def vocabulary_size(self) -> int | None:
        """Number of tokens that the model gives logits for, ``None`` if it is no language model."""
        return self._wrapped.vocabulary_size

    @property
    def n_outputs(self) -> int | None:
        """Logits or regression means per example, ``None`` where only a batch can tell."""
        if self.output is not None:
            return None
        if self.target_ids is not None:
            return len(self.target_ids)
        if self._wrapped.name.endswith(CHOOSING):
            return None  # one per choice
        of_words = self.vocabulary_size  # whatever its configuration says of labels
        return getattr(self.config, "num_labels", None) if of_words is None else of_words

    @property
    def problem_type(self) -> str | None:
        """What the model's configuration says of its labels, where its own logits are taken."""
        is_own = self.output is None and self.target_ids is None
        return getattr(self.config, "problem_type", None) if is_own else None

    def named(self, batch: Any) -> Any:
        """Return a tensor of token ids as a mapping, any other batch as it is, see `WrappedModel`.

        Args:
            batch: As for `forward`.
        """
        return self._wrapped.named(batch)

    def forward(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """Return logits or regression means.

        Args:
            batch: A mapping with the model's inputs (``labels`` are ignored), or a tensor of its
                first input. Token ids without a mask must not be padded, as in a mapping.

        Returns:
            Shape ``(batch, outputs)``, float32 or better. For pairs ``(batch, 2)``, the rewards of
            the rejected and of the chosen texts.

        Raises:
            TypeError: If the batch is neither, as texts are, its tokens are no tensors, or the
                model is sharded, and processes see different data.
            ValueError: If a batch of pairs meets a model with several outputs, or lacks a half, or
                a row has no real token.
        """
        check_runs_same_data(self.model)
        batch = self.named(batch)
        if is_pair(batch):
            rewards = torch.cat([self(half) for half in passes(batch)], dim=-1)
            RewardModeling().check_outputs(rewards.shape[-1] // 2)
            return rewards
        if isinstance(batch, Mapping):
            if self.output is None:  # which may read more than texts
                check_has_texts(batch)
            logits = self._from_mapping(self._wrapped.inputs(batch))
        else:
            x = self._wrapped.tensor(batch)
            before_pass(FORWARD)
            logits = self._logits(self.model(x))
        return wide(logits.to(self.device))  # a model may be spread over devices

    def own_logits(self, batch: Mapping[str, Any] | Tensor) -> Tensor | None:
        """Return the logits that the model itself gives for a batch, ``None`` if ours are these.

        The model runs as a whole, at all tokens and for all of the vocabulary, and counts positions
        by itself.

        Args:
            batch: As for `forward`.
        """
        batch = self.named(batch)
        if not isinstance(batch, Mapping) or self.output is not None:
            return None
        if is_pair(batch):
            rewards = [self.own_logits(half) for half in passes(batch)]
            return torch.cat([reward for reward in rewards if reward is not None], dim=-1)
        inputs = self._wrapped.inputs(batch)
        if self.target_ids is None:
            logits = self._logits(self._wrapped(inputs))
        else:
            position, length = self._answer.find(inputs, self.device)
            logits = self._logits(self._wrapped(inputs))
            logits = at_position(logits, position, length)[:, self.target_ids.to(logits.device)]
        return wide(logits.to(self.device))

    def check_first_step(self, batch: Mapping[str, Any] | Tensor) -> None:
        """Warn if answers are read at a decoder's first step, and it begins a text there.

        Args:
            batch: As for `forward`.
        """
        batch = self.named(batch)
        if self.target_ids is None or not self.is_encoder_decoder or not isinstance(batch, Mapping):
            return
        if batch.get("decoder_input_ids") is None:
            inputs = self._wrapped.inputs(batch)
            self._answer.find(inputs, self.device)
            self._answer.warn_if_begins(self._logits(self._wrapped(inputs))[:, -1], self.target_ids)

    def features(self, batch: Mapping[str, Any] | Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last linear layer sees, and the logits.

        Args:
            batch: As for `forward`.

        Returns:
            Features ``(batch, d)`` at the position that the model itself uses, and logits
            ``(batch, outputs)``.

        Raises:
            ValueError: If the model has no linear last layer.
            RuntimeError: If that layer did not run once per example, or something comes after it.
        """
        return seen_by_head(self._linear_head(), self, batch, self.target_ids)

    def head_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(outputs, d)`` and bias of the last layer; of the answers' rows only.

        Raises:
            ValueError: If there is no linear last layer, or it is quantised or offloaded.
        """
        return head_tensors(self._linear_head(), self.target_ids)

    def _linear_head(self) -> Any:
        if self.target_ids is not None:
            return self._wrapped.answering_head()
        return last_linear(self._wrapped.base, getattr(self.config, "num_labels", None))

    def _count_real_tokens(self, inputs: dict[str, Any]) -> None:
        """Let positions count real tokens only, as in generation, see `PositionRule`."""
        self._positions.apply(
            inputs,
            lambda x: self._logits(self._wrapped(x)),
            lambda: coarsest_dtype(self.model),
            not self.model.training,
        )

    def _from_mapping(self, inputs: dict[str, Any]) -> Tensor:
        if self.target_ids is not None:
            return self._answer_logits(inputs, self.target_ids)
        if self.output is None:
            self._answer.check_starts(self._wrapped.vocabulary_head)
        with score_head_narrowed(self._wrapped.base, inputs):
            return self._logits(self._wrapped(inputs))

    def _logits(self, returned: Any) -> Tensor:
        return self._wrapped.logits(returned) if self.output is None else self.output(returned)

    def _answer_logits(self, inputs: dict[str, Any], ids: Tensor) -> Tensor:
        position, length = self._answer.find(inputs, self.device)
        if self._answer.follows_text:
            self._count_real_tokens(inputs)
        head = self._wrapped.answering_head()
        if self._wrapped.adds_to_vocabulary:
            logits = self._logits(self._wrapped(inputs))
            return at_position(logits, position, length)[:, ids.to(logits.device)]
        with one_token(head, position, length=length), rows_only(head, ids) as narrowed:
            logits = self._logits(self._wrapped(inputs))[:, -1]
        return logits if narrowed else logits[:, ids.to(logits.device)]


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32 or better."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
