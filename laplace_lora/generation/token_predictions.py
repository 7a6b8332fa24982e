"""`TokenPredictions`: what is known about every token of texts, laid out by text and place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_lora.display.coloured import coloured_html, coloured_text
from laplace_lora.display.plots import texts_figure
from laplace_lora.display.tables import data_frame, plain
from laplace_lora.generation.next_token import NextToken
from laplace_lora.generation.token_texts import text_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class TokenPredictions:
    """Predictions of the tokens of texts, one row a text; zeros where ``mask`` is false.

    ``k`` tokens are looked at in each place. The rest of the vocabulary has a share, too, so
    probabilities of the ``k`` sum to less than one. Logarithms are natural.

    Attributes:
        tokens: The tokens that were scored or generated, ``(texts, length)``; the padding token
            where ``mask`` is false.
        mask: Where there are tokens, ``(texts, length)``.
        candidates: The ``k`` tokens looked at, by falling MAP probability, ``(texts, length, k)``.
            The scored token is always among them.
        mean: Their logits, ``(texts, length, k)``.
        covariance: The logits' posterior covariance, ``(texts, length, k, k)``.
        map_probabilities: The candidates' probabilities under the MAP weights.
        probabilities: And under the posterior predictive.
        map_log_prob: Log probability of each token under the MAP weights, ``(texts, length)``.
        log_prob: And under the posterior predictive.
        entropy: Entropy of the predictive over the whole vocabulary, in nats, ``(texts, length)``.
        mutual_information: What of it is epistemic: how much the token would tell about the
            weights, in nats. In float32, what is below a millionth of a nat is rounding.
        log_prob_variance: Posterior variance of the log probability of the whole text, from the
            linearised model, ``(texts,)``. The tokens' correlations count.
        tail_probability: What the predictive leaves to tokens outside the ``k``, ``(texts,
            length)``.
        log_probabilities: Log probability of each whole text under each sample of the weights,
            ``(samples, texts)``: a distribution over answers, the tokens' correlations included.
            ``None`` for ``method="exact"``, which knows moments only.
        stopped: Which texts were ended for their uncertainty, ``(texts,)``, see ``stop_above`` of
            `generate`.
    """

    tokens: Tensor
    mask: Tensor
    candidates: Tensor
    mean: Tensor
    covariance: Tensor
    map_probabilities: Tensor
    probabilities: Tensor
    map_log_prob: Tensor
    log_prob: Tensor
    entropy: Tensor
    mutual_information: Tensor
    log_prob_variance: Tensor
    tail_probability: Tensor
    log_probabilities: Tensor | None
    stopped: Tensor

    @property
    def expected_entropy(self) -> Tensor:
        """The aleatoric part of the entropy, ``(texts, length)``."""
        return self.entropy - self.mutual_information

    @property
    def sequence_map_log_prob(self) -> Tensor:
        """Log probability of each text under the MAP weights, ``(texts,)``."""
        return self.map_log_prob.sum(1)

    @property
    def sequence_log_prob(self) -> Tensor:
        """Log of the product of the tokens' predictive probabilities, ``(texts,)``."""
        return self.log_prob.sum(1)

    @property
    def mean_mutual_information(self) -> Tensor:
        """Mutual information, averaged over the tokens of each text, ``(texts,)``."""
        return self.mutual_information.sum(1) / self.mask.sum(1).clamp(min=1)

    def sequence_quantiles(self, levels: Sequence[float]) -> Tensor:
        """Return quantiles of each text's log probability over the posterior.

        Args:
            levels: Between 0 and 1.

        Returns:
            Shape ``(levels, texts)``.

        Raises:
            ValueError: If there are no samples, because the method was ``"exact"``.
        """
        if self.log_probabilities is None:
            raise ValueError("quantiles need samples; use method='sampled'")
        samples = self.log_probabilities
        return samples.quantile(torch.as_tensor(levels).to(samples), dim=0)

    def __repr__(self) -> str:
        """Return one line: how many texts and tokens, and means of the uncertainties."""
        n = max(int(self.mask.sum()), 1)
        entropy, information = self.entropy.sum() / n, self.mutual_information.sum() / n
        return (
            f"TokenPredictions of {len(self.tokens)} texts, {int(self.mask.sum())} tokens: mean "
            f"entropy {entropy:.4g} nats, of which {information:.4g} epistemic"
        )

    def _repr_html_(self) -> str:
        """Return the token numbers, coloured by epistemic uncertainty, as notebooks show them."""
        return self.to_html()

    def to_html(self, tokenizer: Any = None) -> str:
        """Return the texts as HTML; the ground under a token darkens with its mutual information.

        The darkest is the largest of all; a token's numbers appear when the pointer rests on it.

        Args:
            tokenizer: The model's; without it tokens are shown by number.
        """
        return coloured_html(self.to_dict(tokenizer)["texts"], repr(self))

    def __rich__(self) -> RenderableType:
        """Return the same for a terminal, as `rich.print` shows it."""
        return self.to_rich()

    def to_rich(self, tokenizer: Any = None) -> RenderableType:
        """Return the texts for `rich.print`, coloured as those of `to_html`.

        Args:
            tokenizer: The model's; without it tokens are shown by number.
        """
        return coloured_text(self.to_dict(tokenizer)["texts"], repr(self))

    def plot(self) -> Figure:
        """Draw the mutual information of each token, a line for each of the first texts.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return texts_figure(self.mutual_information, self.mask, "mutual information in nats")

    def to_dict(self, tokenizer: Any = None) -> dict[str, Any]:
        """Return ``{"texts": [...]}``: each text's log probabilities, and its tokens one by one.

        Args:
            tokenizer: The model's; adds texts to the token numbers, see `token_texts`.
        """
        by_text: dict[str, list[Any]] = {
            "log_prob": plain(self.sequence_log_prob),
            "map_log_prob": plain(self.sequence_map_log_prob),
            "log_prob_variance": plain(self.log_prob_variance),
            "mutual_information": plain(self.mean_mutual_information),
            "stopped": plain(self.stopped),
        }
        by_token = {
            "token": self.tokens,
            "prob": self.log_prob.exp(),
            "map_prob": self.map_log_prob.exp(),
            "entropy": self.entropy,
            "mutual_information": self.mutual_information,
        }
        return {"texts": text_rows(by_text, by_token, self.mask, tokenizer)}

    def to_pandas(self, tokenizer: Any = None) -> DataFrame:
        """Return a data frame with one row per token, and its text and place.

        Args:
            tokenizer: The model's; adds texts to the token numbers.

        Raises:
            ImportError: If pandas is missing.
        """
        rows = [
            {"example": i, "place": j, **token}
            for i, text in enumerate(self.to_dict(tokenizer)["texts"])
            for j, token in enumerate(text["tokens"])
        ]
        return data_frame({name: [row[name] for row in rows] for name in rows[0]} if rows else {})

    @classmethod
    def laid_out(
        cls,
        predictions: Sequence[NextToken],
        tokens: Sequence[Tensor],
        where: Sequence[tuple[Tensor, Tensor]],
        texts: int,
        pad: int,
        variance: Tensor | None = None,
        stopped: Tensor | None = None,
    ) -> TokenPredictions:
        """Put predictions of single places into rows of texts.

        Args:
            predictions: Predictions of several places each.
            tokens: The token in each place.
            where: Row and column of each place.
            texts: Number of rows.
            pad: Token where there is no place.
            variance: ``log_prob_variance``; by default that of the predictions' samples.
            stopped: See above; by default none were.
        """
        rows, columns = (torch.cat(indices) for indices in zip(*where, strict=True))

        def laid(values: list[Tensor], fill: int = 0) -> Tensor:
            joined = torch.cat(values)
            out = joined.new_full((texts, int(columns.max()) + 1, *joined.shape[1:]), fill)
            out[rows, columns] = joined
            return out

        def of_token(prediction: NextToken, token: Tensor, values: Tensor) -> Tensor:
            index = (prediction.candidates == token.unsqueeze(-1)).int().argmax(-1, keepdim=True)
            return values.gather(-1, index).squeeze(-1)

        log_probabilities = None
        if variance is None:
            samples, slopes = ([getattr(p, n) for p in predictions] for n in ("samples", "slopes"))
            log_probabilities = laid(samples).sum(1).T
            variance = laid(slopes).sum(1).square().mean(-1)
        if stopped is None:
            stopped = torch.zeros(texts, dtype=torch.bool, device=rows.device)
        pairs = list(zip(predictions, tokens, strict=True))
        return cls(
            tokens=laid(list(tokens), pad),
            mask=laid([torch.ones_like(token, dtype=torch.bool) for token in tokens]),
            candidates=laid([p.candidates for p in predictions]),
            mean=laid([p.mean for p in predictions]),
            covariance=laid([p.covariance for p in predictions]),
            map_probabilities=laid([p.map_log_probabilities.exp() for p in predictions]),
            probabilities=laid([p.log_probabilities.exp() for p in predictions]),
            map_log_prob=laid([of_token(p, t, p.map_log_probabilities) for p, t in pairs]),
            log_prob=laid([of_token(p, t, p.log_probabilities) for p, t in pairs]),
            entropy=laid([p.entropy for p in predictions]),
            mutual_information=laid([p.mutual_information for p in predictions]),
            log_prob_variance=variance,
            tail_probability=laid([p.tail_probability for p in predictions]),
            log_probabilities=log_probabilities,
            stopped=stopped,
        )
