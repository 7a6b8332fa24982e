"""`PredictedLaplace`: predictions, and what the posterior says of single weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.acquisition.acquire import Acquisition, acquire
from laplace_lora.likelihoods.base import labels_tokens
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.posteriors.evidence import EvidenceLaplace
from laplace_lora.predictive.data_sets import ExamplePredictor, predict
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.linear_samples import AUTO
from laplace_lora.predictive.predictions import Predictions
from laplace_lora.predictive.query import Query
from laplace_lora.predictive.span_data_sets import predict_spans
from laplace_lora.predictive.span_predictions import SpanPredictions
from laplace_lora.predictive.spans import SpanPredictor, check_sampled, span_probabilities
from laplace_lora.predictive.token_class_predictions import TokenClassPredictions
from laplace_lora.predictive.token_classes import TokenClassPredictor, token_probabilities
from laplace_lora.predictive.token_data_sets import predict_tokens


class PredictedLaplace(EvidenceLaplace):
    """Predictions of a posterior, whose work is done by `Predictor`."""

    @in_full_precision
    def __call__(
        self,
        x: Any,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = QUADRATURE,
        n_samples: int | None = None,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        method: str = AUTO,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the posterior predictive of a batch.

        The GLM predictive is ``f ~ N(f_MAP, J P⁻¹ Jᵀ)``. Class probabilities are the softmax
        averaged over it. A softmax does not see a shift of all logits, so ``C − 1`` contrasts of
        logits are propagated and integrated over, without random numbers. laplace-torch's
        ``"probit"`` scales each logit by its own variance, the shift's included; for answer tokens
        of a language model that is most of it.

        A reward model answers single texts like a regression, and pairs like a classifier: the
        probabilities that the rejected and that the chosen text wins, from the difference of the
        rewards alone. Pairs have keys that end in ``_chosen`` and ``_rejected``, see `data.pairs`.

        A token classifier answers for every token, a question-answering model with every token as
        start and as end of an answer; both by default from samples, see `TokenClassPredictor` and
        `SpanPredictor`.

        Args:
            x: Batch that the model takes.
            pred_type: ``"glm"`` (linearised) or ``"nn"`` (sampled weights, ``link_approx="mc"``).
            joint: For regression, covariances between the examples as well; no effect on
                probabilities, which are of one example each.
            link_approx: ``"quadrature"``, the integral; or laplace-torch's ``"mc"`` (the same from
                samples), ``"probit"``, ``"bridge"`` or ``"bridge_norm"``.
            n_samples: Samples of the weights, 64 by default; 100 for ``"mc"`` and ``"nn"``.
            diagonal_output: Ignore covariances between outputs: of regressions, and of the logits
                of classes that exclude each other with ``"quadrature"`` and ``"mc"``. No effect
                elsewhere, as on pairs, of which the one difference of the rewards counts.
            generator: Source of the samples, on the posterior's device. Samples of the linearised
                model have a fixed seed by default, so two calls agree.
            fitting: Of laplace-torch: for reward models, read the batch as pairs, whatever it
                looks like, see `as_pairs`.
            method: How a classifier's GLM predictive is computed with the default link.
                ``"exact"``: from the moments of the logits, a backward pass for each contrast.
                ``"sampled"``: the softmax averaged over samples of the linearised model, whose
                cost does not grow with the classes, see `LinearSamples`. ``"auto"``: the cheaper
                one, which is ``"sampled"`` from about 50 classes on.

        Returns:
            Class probabilities ``(batch, classes)``. For regression mean ``(batch, outputs)`` and
            covariance ``(batch, outputs, outputs)``; if joint ``(batch·outputs,)`` and its square;
            if ``pred_type="nn"`` mean and variance of the samples, ``(batch, outputs)`` each. Of
            token classifiers ``(batch, tokens, classes)``, zeros at padding; of question-answering
            models ``(batch, 2, tokens)``.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If an option is unknown or goes with another method, the generator is on
                another device, or ``"sampled"`` meets a model that cannot carry tangents
                (``"auto"`` computes exact moments there).
            TypeError: If the generator is none, such as a seed.
        """
        posterior = self.fitted
        query = Query(
            pred_type=pred_type,
            joint=joint,
            link_approx=link_approx,
            n_samples=n_samples,
            diagonal_output=diagonal_output,
            generator=generator,
            fitting=fitting,
            method=method,
        )
        if labels_tokens(posterior.objective):
            return token_probabilities(posterior, x, query)
        if posterior.objective.has_spans:
            return span_probabilities(posterior, x, query)
        return Predictor(posterior)(x, query)

    @in_full_precision
    def reward_difference(self, pairs: Any) -> tuple[Tensor, Tensor]:
        """Return the linearised posterior of ``r_chosen − r_rejected``.

        The variance is that of the difference of the Jacobians: what the two rewards share, such
        as a common shift, cancels.

        Args:
            pairs: Batch of pairs in any form that a fit takes, see `as_pairs`.

        Returns:
            Mean and variance, ``(batch,)`` each.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If the batch holds no pairs.
        """
        return Predictor(self.fitted).reward_difference(pairs)

    @in_full_precision
    def predict(
        self,
        data: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 32,
        link_approx: str = QUADRATURE,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
        progress_bar: bool | None = None,
        method: str = AUTO,
    ) -> Predictions | TokenClassPredictions | SpanPredictions:
        """Predict a whole data set with the GLM predictive.

        Args:
            data: One of these, in any iterable or, if they are only indexed, in what has a length:

                * a loader, or batches as one yields them: mappings, tensors, or pairs of inputs
                  and labels;
                * one batch, a mapping, a tensor, or a pair of inputs and labels;
                * texts: one string, or strings or pairs of strings in a list, a tuple, a
                  generator, a numpy array, a pandas series or a column of a data set;
                * rows of a data set, one example each: mappings with ``input_ids``,
                  ``pixel_values`` or ``input_features`` that have no dimension for the batch.
            tokenizer: The model's. Texts need it, and rows of different lengths. Texts that begin
                with its ``bos_token``, as chat templates write it, get no second one.
            batch_size: Texts or rows per batch; those of similar length share one.
            link_approx: Link of ``probs``, as in calling the posterior.
            n_samples: Samples of the weights, 64 by default, drawn once for all data; or of the
                ``"mc"`` link, 1000 by default, of its entropy and mutual information too. All
                other links take fixed points for these two, and nothing random.
            generator: Source of the samples, on the posterior's device; a fixed seed by default.
            progress_bar: Whether to show progress, see `progress`.
            method: As in calling the posterior. Of samples, ``covariance`` is the sampled one.

        Returns:
            Probabilities, moments of the logits and uncertainties, in the order of the data. Where
            processes share the data, all get those of all, one process's after another's. Of token
            classifiers `TokenClassPredictions`, of question-answering models `SpanPredictions`.

        Raises:
            AttributeError: If the posterior has not been fitted.
            TypeError: If the data are none of these.
            ValueError: If the data are empty, texts or rows of different lengths come without a
                tokenizer or have no tokens, the tokenizer cannot pad, the link or method is
                unknown or they do not go together, ``batch_size`` is no positive number, or the
                posterior is a language model's.
        """
        posterior = self.fitted
        if labels_tokens(posterior.objective):
            tokens = TokenClassPredictor(posterior, link_approx, n_samples, generator, method)
            return predict_tokens(tokens, data, tokenizer, batch_size, progress_bar)
        if posterior.objective.has_spans:
            check_sampled("glm", link_approx, method)
            spans = SpanPredictor(posterior, n_samples, generator)
            return predict_spans(spans, data, tokenizer, batch_size, progress_bar)
        examples = ExamplePredictor(posterior, link_approx, n_samples, generator, method)
        return predict(examples, data, tokenizer, batch_size, progress_bar)

    @in_full_precision
    def acquire(
        self,
        pool: Any,
        n: int,
        method: str = "batchbald",
        tokenizer: Any = None,
        *,
        batch_size: int = 32,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
        progress_bar: bool | None = None,
    ) -> Acquisition:
        """Rank unlabelled data for labelling (active learning).

        * ``"entropy"``: the largest predictive entropy, whatever its cause.
        * ``"bald"``: the largest mutual information of label and weights (Houlsby et al. 2011,
          arXiv:1112.5745), each example for itself.
        * ``"batchbald"``: the largest joint mutual information, so that not all of a batch are
          alike, see `batch_bald`; scores are the information that each adds, in nats. From ``S``
          samples they sum to about ``ln S`` at most; near that, picks are noise, and a warning says
          from where on.
        * ``"bait"``: the smallest predictive variance of the pool afterwards, see `bait`; scores
          are by how much it would rise without each.

        Args:
            pool: Data as for `predict`; labels do not count.
            n: How many to choose.
            method: As above.
            tokenizer: The model's. Texts need it, and rows of different lengths.
            batch_size: Texts or rows per batch.
            n_samples: Samples of the weights for the last two, 128 by default, for which each
                example's Jacobian is taken once. From their covariance ``"batchbald"`` draws 2048
                samples of the pool's outputs (fewer if examples times classes are above 16 384),
                and takes the weights' own if these are more. For the first two as in `predict`.
            generator: Their source, on the posterior's device; a fixed seed by default.
            progress_bar: Whether to show progress, see `progress`.

        Returns:
            Places in the pool, the most wanted first, and scores.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If the method is unknown, the posterior is no classifier's, the pool is a
                loader that shuffles, or has fewer examples than are asked for.
        """
        options = (batch_size, n_samples, generator, progress_bar)
        return acquire(self.fitted, pool, n, method, tokenizer, *options)

    @in_full_precision
    def marginals(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Return posterior mean and standard deviation of every weight, by parameter.

        Correlations between weights are left out. A calibrated width counts.

        Raises:
            AttributeError: If the posterior has not been fitted.
        """
        posterior = self.fitted
        sizes, deviations = posterior.engine.sizes, self.weight_variance().sqrt()
        columns = (self.params, posterior.centre.split(sizes), deviations.split(sizes))
        return {p: (mean.view_as(p), std.view_as(p)) for p, mean, std in zip(*columns, strict=True)}

    @in_full_precision
    @torch.no_grad()
    def weight_variance(self) -> Tensor:
        """Return the diagonal of the posterior covariance, ``(parameters,)``, as `sample` has it.

        With the calibrated width, ``covariance_scale``, which `posterior_precision` is without.
        """
        variance: Tensor = self.covariance_scale * self.fitted.precision.variance()
        return variance
