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

    Raises:
        ValueError: If the posterior is no reward model's.
    """

    def __init__(
        self,
        posterior: LoraLaplace,
        tokenizer: Any,
        beta: float = 1.0,
        batch_size: int = 16,
        name: str = "pessimistic_reward",
    ) -> None:
        if posterior.objective.name != "reward_modeling":
            raise ValueError(
                "a pessimistic reward needs a posterior with likelihood='reward_modeling', not "
                f"{posterior.objective.name!r}"
            )
        self.posterior, self.tokenizer = posterior, tokenizer
        self.beta, self.batch_size = beta, batch_size
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
                tokens, its prompt's and special ones included.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts do not fit {len(completions)} completions")
        groups: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(repr(prompt), []).append(place)
        texts = [self._text(*pair) for pair in zip(prompts, completions, strict=True)]
        mean = torch.zeros(len(texts), dtype=torch.float64)
        deviation = torch.zeros_like(mean)
        for places in groups.values():
            if len(places) > 1:
                batch = self._batch(texts, places, prompts[places[0]])
                m, joint = self.posterior(batch, joint=True)
                mean[places] = m.flatten().double().cpu()
                deviation[places] = _centred(joint.double()).diagonal().clamp(min=0).sqrt().cpu()
        singles = [places[0] for places in groups.values() if len(places) == 1]
        for is_plain in (True, False):  # which are tokenised differently
            alone = [p for p in singles if isinstance(prompts[p], str) == is_plain]
            for start in range(0, len(alone), self.batch_size):
                part = alone[start : start + self.batch_size]
                batch = self._batch(texts, part, prompts[part[0]])
                m, variance = self.posterior(batch)
                mean[part] = m.flatten().double().cpu()
                deviation[part] = variance.flatten().double().sqrt().cpu()
        return mean, deviation

    def _batch(self, texts: list[str], places: list[int], prompt: Text) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            [texts[place] for place in places],
            truncation=True,
            padding=True,
            return_tensors="pt",
            # A chat template has written a conversation's special tokens.
            add_special_tokens=isinstance(prompt, str),
        )
        real = encoded["attention_mask"].any(1).tolist()
        if not all(real):  # a row of padding has a reward, which means nothing
            empty = [place for place, is_real in zip(places, real, strict=True) if not is_real]
            raise ValueError(
                f"completions {empty} have no tokens, nor have their prompts, so there is nothing "
                "to reward; leave them out"
            )
        device = self.posterior.fitted.device
        return {name: tensor.to(device) for name, tensor in encoded.items()}

    def _text(self, prompt: Text, completion: Text) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError("prompt and completion must both be texts or both be messages")
        text: str = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        return text


def _centred(joint: Tensor) -> Tensor:
    """Return the covariance of the differences to the mean of all, ``H Σ H``."""
    rows = joint - joint.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)
