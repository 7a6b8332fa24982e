"""Reward modelling: the chosen text of a preference pair has the higher reward.

A classification of pairs by the difference of their rewards; single texts are predicted like the
outputs of a regression.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.pairs import as_pairs, check_not_stacked, is_pair
from laplace_lora.likelihoods.base import CONTRASTS, OUTPUTS, Readout, Scoring
from laplace_lora.likelihoods.classification import Classification, ClassScoring
from laplace_lora.likelihoods.links import Link

NO_PAIRS = "a difference needs pairs: 'input_ids_chosen', 'input_ids_rejected'"
DIFFERENCE = CONTRASTS  # of the rewards [rejected, chosen]: one, the chosen less the rejected


class RewardModeling(Classification):
    """The Bradley-Terry likelihood of the rewards ``[rejected, chosen]``, see `data.pairs`."""

    name = "reward_modeling"
    laplace_name = "reward_modeling"
    has_pairs = True

    def check_outputs(self, outputs: int | None) -> None:
        """Refuse a model with several outputs.

        Raises:
            ValueError: If there is more than one.
        """
        if outputs not in (None, 1):
            raise ValueError(
                f"a reward model has one output, this one {outputs}; load it through "
                "AutoModelForSequenceClassification with num_labels=1 (one that TRL's DPOTrainer "
                "has trained is a language model, whose likelihood is 'language_modeling')"
            )

    def by_example(self, batch: Any, label_key: str) -> Any:
        """Return a batch with one row per pair, see `as_pairs`."""
        return as_pairs(batch, label_key)

    def split(
        self, batch: Any, label_key: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Tensor]:
        """Split a batch into pairs and labels, 1 where the chosen text wins, see `as_pairs`."""
        return super().split(as_pairs(batch, label_key), label_key, device, dtype)

    def readout(self, x: Any, pairs: bool = False, contrasts: bool = False) -> Readout:
        """Return the difference of the rewards for pairs, the rewards for single texts.

        Raises:
            ValueError: If ``pairs`` is set and the inputs are none, or they are stacked pairs,
                which are neither single texts nor pairs with suffixes.
        """
        check_not_stacked(x)
        if pairs and not is_pair(x):
            raise ValueError(NO_PAIRS)
        return DIFFERENCE if is_pair(x) else OUTPUTS

    def scoring(self, link: Link, noise: float) -> Scoring:
        """Return the scoring of the probabilities that each text wins."""
        return ClassScoring(link, DIFFERENCE)
