"""`EvidenceLaplace`: the log evidence, and when its gradient term is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.one_draw import same_draw
from laplace_lora.fitting.fitter import Fitter
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.posteriors.laplace_names import LaplaceNames
from laplace_lora.tuning.evidence.marginal_likelihood import with_term


class EvidenceLaplace(LaplaceNames):
    """The log evidence; measures its gradient term when it is first asked for."""

    _train_loader: Any = None  # all data of the fit, as long as they are at hand

    @in_full_precision
    def log_marginal_likelihood(
        self,
        prior_precision: Tensor | None = None,
        sigma_noise: Tensor | None = None,
        correction: bool = False,
        train_loader: Any = None,
    ) -> Tensor:
        """Return the log evidence, differentiable in what is passed.

        With the correction it is that of the quadratic expansion at weights that are no mode of
        prior and likelihood: ``½ bᵀ P⁻¹ b`` more. `FullLoraLaplace` knows the term exactly, see
        `RowTerm`; the others a lower bound, see `Subspace`, which takes a few passes over the
        training data when it is first asked for. Without it, laplace-torch's.

        Args:
            prior_precision: Replaces the present one.
            sigma_noise: Replaces the present one, of a regression.
            correction: Whether to add the gradient term, which `optimize_prior_precision` takes
                in when it maximises the evidence.
            train_loader: The training data, if not those of the fit in this process.

        Returns:
            A scalar in nats.

        Raises:
            ValueError: If the correction is asked for and needs training data that are not at hand
                or are others than those of the fit, or there is a prior precision per weight.
            FloatingPointError: If a classifier's corrected evidence is above zero, which would mean
                labels with a probability above one: there the quadratic expansion does not hold.
        """
        if not correction:
            return super().log_marginal_likelihood(prior_precision, sigma_noise)
        before = self.state
        try:
            if prior_precision is not None:
                self.prior_precision = prior_precision
            if sigma_noise is not None:
                if not self.fitted.objective.has_noise:
                    raise ValueError("only a regression has observation noise")
                self.sigma_noise = sigma_noise
            return self._corrected(train_loader)
        except BaseException:
            self.state = before  # with the prior and the noise of then
            raise

    def _corrected(self, train_loader: Any) -> Tensor:
        """Return the evidence with its gradient term, see `log_marginal_likelihood`."""
        self.measure_gradient_term(train_loader)
        posterior = self.fitted
        if len(posterior.settings.prior_precision) not in (1, len(posterior.names)):
            raise ValueError("the gradient term takes one prior precision in all or per tensor")
        value = with_term(posterior)
        whole = float(value.detach())
        if posterior.objective.is_classifier and whole > 0:
            raise FloatingPointError(
                f"the log evidence with its gradient term is {whole:.1f} nats, above zero: so far "
                "from a mode the quadratic expansion does not hold. Take a stronger prior "
                "(prior_precision), or correction=False"
            )
        return value

    @in_full_precision
    def measure_gradient_term(
        self, train_loader: Any = None, progress_bar: bool | None = None
    ) -> None:
        """Measure what the evidence's gradient term needs, unless it is known already.

        Three passes over the training data, or some more until the prior that the evidence asks for
        changes by less than a tenth; one more where the fit draws labels, as of language models,
        and has not collected the loss's gradient. `FullLoraLaplace` needs none. Files that are
        saved afterwards hold the result.

        Args:
            train_loader: The training data, if not those of the fit in this process.
            progress_bar: Whether to show progress, see `progress`.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If the data are not at hand or are others than those of the fit.
        """
        posterior = self.fitted
        if posterior.gradient_term is not None:
            return
        loader = self._train_loader if train_loader is None else train_loader
        if loader is None:
            raise ValueError(
                "the evidence's gradient term takes passes over the training data, which are "
                "not at hand: give `train_loader`, or take the evidence without it "
                "(correction=False)"
            )
        loader = same_draw(loader, "the evidence's gradient term")
        with torch.no_grad():
            self.state = Fitter(posterior).with_gradient_term(loader, progress_bar)
