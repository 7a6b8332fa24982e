"""`PessimisticReward`: rewards less a multiple of their deviation, for TRL and for best-of-n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora.posteriors.base import LoraLaplace

Text = str | list[dict[str, str]]  # plain, or the messages of a conversation


class PessimisticReward:
    """``mean − β · deviation`` of a reward model's posterior, as a reward function of TRL's GRPO.

    Optimising a reward model finds texts about which it is wrong; a pessimistic one does not pay
    for what it does not know (Coste et al. 2024, arXiv:2310.02743, with ensembles; Yang et al.
    2024, arXiv:2402.13210, with Laplace-LoRA).

    Preferences say nothing about a shift common to all rewards, so where a prompt has several
    completions the deviation is that of the reward's difference to their mean, correlations
    included. A single completion has its own reward's deviation.

    Args:
        posterior: Fitted with likelihood ``"reward_modeling"``.
        tokenizer: The reward model's.
        beta: How many standard deviations are taken off; below 0 it pays for uncertainty.
        batch_size: Prompts' completions are never split; of single texts this many run together.
        name: Under which TRL logs it.
        append_eos: Whether plain texts end with the tokenizer's end-of-text token, which is
            appended where they lack it. TRL's ``RewardTrainer`` trains on such texts, and a decoder
            is read at their last token. Conversations end as the chat template ends them.

    Raises:
        ValueError: If the posterior is no reward model's, or the tokenizer has no token to append.
    """

    def __init__(
        self,
        posterior: LoraLaplace,
        tokenizer: Any,
        beta: float = 1.0,
        batch_size: int = 16,
        name: str = "pessimistic_reward",
        append_eos: bool = False,
    ) -> None:
        if posterior.objective.name != "reward_modeling":
            raise ValueError(
                "a pessimistic reward needs a posterior with likelihood='reward_modeling', not "
                f"{posterior.objective.name!r}"
            )
        self.posterior, self.tokenizer = posterior, tokenizer
        self.beta, self.batch_size = beta, batch_size
        self._end: str = (tokenizer.eos_token or "") if append_eos else ""
        if append_eos and not self._end:
            raise ValueError("append_eos=True needs a tokenizer with an `eos_token`")
        self.__name__ = name

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any
    ) -> list[float]:
        """Return a reward per completion, as TRL's ``reward_funcs`` are called.

        Args:
            prompts: A prompt per completion; equal ones belong together, wherever they stand.
            completions: Texts, or messages of conversations.
            **_: What else TRL passes: completion ids and columns of the data set.
        """
        mean, deviation = self.moments(prompts, completions)
        return (mean - self.beta * deviation).tolist()

    def best(self, prompt: Text, completions: Sequence[Text]) -> int:
        """Return the place of the completion with the highest pessimistic reward (best of n).

        Raises:
            ValueError: If there are no completions.
        """
        if not completions:
            raise ValueError("there are no completions to choose from")
        scores = self([prompt] * len(completions), completions)
        return max(range(len(scores)), key=scores.__getitem__)

    @torch.no_grad()
    def moments(
        self, prompts: Sequence[Text], completions: Sequence[Text]
    ) -> tuple[Tensor, Tensor]:
        """Return mean rewards and their deviations, ``(completions,)`` each.

        Raises:
            ValueError: If there are not as many prompts as completions, or one of these has no
                tokens or so many that it would lose its end, its prompt's and special ones
                included.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts do not fit {len(completions)} completions")
        groups: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(repr(prompt), []).append(place)
        rows = self._rows(prompts, completions)
        mean = torch.zeros(len(rows), dtype=torch.float64)
        deviation = torch.zeros_like(mean)
        for places in groups.values():
            if len(places) > 1:
                m, joint = self.posterior(self._batch(rows, places), joint=True)
                mean[places] = m.flatten().double().cpu()
                deviation[places] = _centred(joint.double()).diagonal().clamp(min=0).sqrt().cpu()
        singles = [places[0] for places in groups.values() if len(places) == 1]
        for start in range(0, len(singles), self.batch_size):
            part = singles[start : start + self.batch_size]
            m, variance = self.posterior(self._batch(rows, part))
            mean[part] = m.flatten().double().cpu()
            deviation[part] = variance.flatten().double().sqrt().cpu()
        return mean, deviation

    def _batch(self, rows: list[Any], places: list[int]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad([rows[place] for place in places], return_tensors="pt")
        device = self.posterior.fitted.device
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def _rows(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Any]:
        """Return the tokens of each prompt with its completion."""
        keeps_ends = getattr(self.tokenizer, "truncation_side", "right") == "left"
        rows = [
            self.tokenizer(
                self._text(prompt, completion),
                truncation=keeps_ends,
                # A chat template has written a conversation's special tokens.
                add_special_tokens=isinstance(prompt, str),
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        lengths = [len(row["input_ids"]) for row in rows]
        empty = [place for place, length in enumerate(lengths) if not length]
        if empty:  # a row of padding has a reward, which means nothing
            raise ValueError(
                f"completions {empty} have no tokens, nor have their prompts, so there is nothing "
                "to reward; leave them out"
            )
        limit = self.tokenizer.model_max_length
        long = [place for place, length in enumerate(lengths) if length > limit]
        if long:
            raise ValueError(
                f"completions {long[:5]} have, with their prompts, more tokens than the "
                f"tokenizer's model_max_length={limit}, and what is cut off has no reward; shorten "
                "them, or set tokenizer.truncation_side = 'left'"
            )
        return rows

    def _text(self, prompt: Text, completion: Text) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            whole = prompt + completion
            return whole if whole.endswith(self._end) else whole + self._end
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError("prompt and completion must both be texts or both be messages")
        text: str = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        return text


def _centred(joint: Tensor) -> Tensor:
    """Return the covariance of the differences to the mean of all, ``H Σ H``."""
    rows = joint - joint.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)
