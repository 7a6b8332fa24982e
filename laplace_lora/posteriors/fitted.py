"""`FittedLaplace`: fits, and curvature taken over from elsewhere; the work is done by `Fitter`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import DataLoader

from laplace_lora.data.chained import chained
from laplace_lora.data.one_draw import one_draw, remember
from laplace_lora.fitting.fitter import Fitter
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.posteriors.saved import SavedLaplace
from laplace_lora.structures.state import PosteriorState


class FittedLaplace(SavedLaplace):
    """What installs a new state, and forgets what was known of the one before."""

    @in_full_precision
    def fit(
        self,
        train_loader: DataLoader[Any],
        override: bool = True,
        progress_bar: bool | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        evidence_correction: bool | None = None,
    ) -> None:
        """Fit the posterior at the model's current weights.

        One forward pass and ``C − 1`` backward passes per batch, and once more if eigenvalues are
        corrected; for models of tokens and of spans one backward pass, which draws labels from
        torch's global generator. The result does not depend on batch size or padding. If anything
        fails, the earlier posterior stays as it was.

        The prior stays as it was set or tuned, with the width that `optimize_prior_precision` chose
        for it; a calibration and a moved mean are undone.

        Where several processes share a loader (a `DistributedSampler`, or one that accelerate has
        prepared), all end with the posterior of all data; examples that the sampler repeats count
        once, and an error in one process ends all.

        Args:
            train_loader: Batches with labels: mappings with ``dict_key_y``, or pairs. For a reward
                model preference pairs, see `as_pairs`, which need no labels. If it draws other
                examples in each pass, all passes of this fit and its tunings see those of one draw.
            override: Start anew; ``False`` adds these data to those fitted before.
            progress_bar: Whether to show progress, see `progress`.
            checkpoint_dir: Where the sums so far are kept. A fit that was interrupted goes on
                there, after the batches it had seen, if the loader yields the same ones in the
                same order and as many processes share it. Its files, one per pass and process, are
                deleted at the end.
            checkpoint_every: Batches from one writing to the next, 100 by default.
            evidence_correction: When to measure what the evidence gains because trained weights
                are no mode of the prior, see `Subspace`, which takes one more pass over the data.
                ``None``: when an evidence is first asked for. ``True``: now, so that files hold it.
                ``False``: not unless `optimize_prior_precision` is given ``correction=True``; a
                prior tuned without it is far too weak where weights were trained without it.

        Raises:
            TypeError: If the loader has no ``dataset``, or a batch is neither mapping nor pair.
            ValueError: If the loader is empty, labels are missing or out of range, passes see
                different numbers of examples, or what is kept in ``checkpoint_dir`` is damaged or
                is of another fit.
            FloatingPointError: If the loss or the curvature is not finite; names batch and layer.
            RuntimeError: If another process that shares the loader failed or had no examples, or
                data are added where the model was rounded to a coarser dtype since.

        Warns:
            UserWarning: If ``checkpoint_dir`` holds files of a fit in another number of processes.
        """
        alone = override or not self.state.is_fitted
        self._weights_watch.look_again()
        fitter = Fitter(self.parts if alone else self.fitted)
        options = (override, progress_bar, checkpoint_dir, checkpoint_every, evidence_correction)
        drawn = one_draw(train_loader)
        if not alone:
            self._weights_watch.check_not_rounded(self.parts)
        loaders = [drawn] if alone else [self._train_loader, drawn]
        with in_turn(self.logits_model):
            self._install(fitter.fit(drawn, *options))
        remember(train_loader, drawn)
        self._train_loader = chained(loaders)
        self._leaves_correction_out = evidence_correction is False

    @in_full_precision
    def adopt(self, curvature: Any, n_data: int, train_loader: Iterable[Any] | None = None) -> None:
        """Take over a curvature that was computed elsewhere, at the model's current weights.

        Args:
            curvature: What `curvature` would return: of the mean loss times the number of examples.
            n_data: Number of training examples.
            train_loader: Training data with labels, for the log evidence; without it the evidence
                is not a number.

        Raises:
            ValueError: If the curvature's diagonal has negative entries, or there is no loader and
                the model does not say how many outputs it has.
        """
        self._install(Fitter(self.parts).adopt(curvature, n_data, train_loader))

    @in_full_precision
    def merge(self, others: Sequence[FittedLaplace]) -> None:
        """Add what posteriors of the same model learnt from other data.

        The result is that of one fit on all the data, or near to it where eigenvalues are
        corrected, see `CorrectedKron.joined`. Prior and width stay, and a calibration is undone,
        as by `fit`.

        Args:
            others: Fitted posteriors of the same class, arguments and weights, on disjoint data.
                That their models' functions ``output`` do the same is up to you where they have
                the same name.

        Raises:
            AttributeError: If one has not been fitted.
            ValueError: If one is of another class, or its arguments, backend or model are others,
                or its outputs are read by a function ``output`` of another name.
        """
        loaders = [posterior._train_loader for posterior in (self, *others)]
        self._install(Fitter(self.fitted).merge([other.fitted for other in others]))
        self._train_loader = chained(loaders)

    def _install(self, state: PosteriorState) -> None:
        self.state, self._latest = state, None
        self._train_loader, self._tuning, self._leaves_correction_out = None, None, False
        self.model.output_size = state.n_outputs  # type: ignore[assignment]
