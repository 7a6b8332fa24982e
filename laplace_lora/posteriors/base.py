"""`LoraPosterior`: what Laplace posteriors over adapter weights share.

Wrapping the model, choosing what is covered, and the device. The shape of the precision belongs to
`posterior`, fitting to `fitting`, predictions to `predictive`, tuning to `tuning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.selection import trainable_only
from laplace_lora.curvature.backends import LoraCurvature, LoraGGN
from laplace_lora.data.pairs import REWARD_MODELING
from laplace_lora.fitting.fitter import Fitting
from laplace_lora.likelihoods.roots import CLASSIFICATION, LANGUAGE_MODELING
from laplace_lora.linalg.kron import LowRankKron
from laplace_lora.linalg.kron_eigen import LowRankKronDecomposed
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.models.token_model import TokenModel
from laplace_lora.posteriors.memory import MemoryEstimate, estimate_memory
from laplace_lora.predictive.data_sets import Predictions, predict
from laplace_lora.predictive.glm import StreamingPredictive
from laplace_lora.storage.archive import Saving
from laplace_lora.tuning.tuner import PriorTuning


class LoraPosterior(Fitting, PriorTuning, Saving, StreamingPredictive):
    """What the posteriors over all adapter weights share.

    Prior, curvature and evidence are kept in float32 or better, whatever the model's format.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``; ``"regression"``; ``"reward_modeling"`` for a model with
            one output that is fitted on preference pairs, see `preferences`; or
            ``"language_modeling"`` for next-token prediction of a causal language model, see
            `language`.
        target_ids: Answer tokens of a causal language model, see `LogitsModel`.
        modules: Which trainable modules the posterior covers: a regular expression searched for in
            their names, or a list of names or of whole parts of them. The others stay at their
            MAP values. ``None`` covers all.
        uncovered: What becomes of trainable tensors that no Kronecker factor covers: ``"error"``
            names them, ``"diag"`` gives each the exact diagonal, see `Differentiation`.
        backend: `LoraGGN`, `LoraEF` or a subclass.
        backend_kwargs: Arguments of the backend, such as ``kfac_approx`` or ``stochastic``.
        **kwargs: laplace-torch's arguments, such as ``prior_precision``, ``sigma_noise`` and
            ``temperature``.

    Raises:
        ValueError: If nothing is trainable, a trainable tensor belongs to no linear map, or
            ``modules`` matches nothing, or a reward model has several outputs.
        RuntimeError: If an adapter is merged or disabled, or several are active.
        TypeError: If the backend is not one of this package's.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        target_ids: Sequence[int] | Tensor | None = None,
        modules: str | Sequence[str] | None = None,
        uncovered: str = "error",
        backend: type[LoraCurvature] = LoraGGN,
        backend_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(backend, type) and issubclass(backend, LoraCurvature)):
            raise TypeError(f"backend must be LoraGGN, LoraEF or a subclass, got {backend!r}")
        self.modules = modules
        language = likelihood == LANGUAGE_MODELING
        wrapped = TokenModel.around if language else self._wrapped
        model = wrapped(model, target_ids)
        self.logits_model: Any = getattr(model, "source", model)
        outputs = self.logits_model.n_outputs
        if likelihood == REWARD_MODELING and outputs not in (None, 1):
            raise ValueError(
                f"a reward model has one output, this one {outputs}; load it with num_labels=1"
            )
        options = {"uncovered": uncovered, **(backend_kwargs or {})}
        kwargs = {"backend": backend, "backend_kwargs": options, **kwargs}
        with trainable_only(model, modules):
            # laplace-torch does not know of language models; to it tokens are classes.
            super().__init__(model, CLASSIFICATION if language else likelihood, **kwargs)
            self.likelihood = likelihood
            # Built now, so that what it cannot cover is refused before a fit.
            self.params = [block.parameter for block in self.backend.blocks]

    @property
    def _device(self) -> torch.device:
        # laplace-torch's is that of the first parameter, which may be offloaded.
        return self.logits_model.device

    @staticmethod
    def _wrapped(model: nn.Module, target_ids: Sequence[int] | Tensor | None) -> nn.Module:
        if not isinstance(model, LogitsModel):
            return LogitsModel(model, target_ids=target_ids)
        if target_ids is not None:
            raise ValueError("the model is a LogitsModel already; give it the `target_ids`")
        return model

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for model and backend."""
        ids = self.logits_model.target_ids
        return {
            "likelihood": self.likelihood,
            "target_ids": None if ids is None else ids.tolist(),
            "modules": self.modules,
            "backend_kwargs": dict(self._backend_kwargs),
            "temperature": self.temperature,
            "dict_key_y": self.dict_key_y,
        }

    def marginals(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Return posterior mean and standard deviation of every weight, by parameter.

        Correlations between weights are left out. A calibrated width counts.

        Raises:
            AttributeError: If the posterior has not been fitted.
        """
        self._check_H_init()
        sizes = [parameter.numel() for parameter in self.params]
        deviations = (self.covariance_scale * self.weight_variance()).sqrt().split(sizes)
        means = self.mean.split(sizes)
        return {
            p: (mean.view_as(p), std.view_as(p))
            for p, mean, std in zip(self.params, means, deviations, strict=True)
        }

    def predict(
        self,
        data: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 32,
        link_approx: str = "probit",
        n_samples: int = 1000,
        generator: torch.Generator | None = None,
        progress_bar: bool = True,
    ) -> Predictions:
        """Predict a whole data set with the GLM predictive.

        Args:
            data: A loader; one batch (a mapping or a tensor); or, with a tokenizer, a list of
                strings or of pairs of strings.
            tokenizer: The model's, for texts.
            batch_size: Texts a batch; texts of similar length share one.
            link_approx: Link of ``probs``, as in calling the posterior.
            n_samples: Samples behind ``entropy``, ``mutual_information`` and the ``"mc"`` link.
            generator: Source of the samples, on the posterior's device.
            progress_bar: Show progress over the batches, in the main process.

        Returns:
            Probabilities, moments of the logits and uncertainties, in the order of the data. Where
            processes share the data, all get those of all, one process's after another's.

        Raises:
            AttributeError: If the posterior has not been fitted.
            TypeError: If the data are none of these.
            ValueError: If the data are empty, texts come without a tokenizer, the tokenizer cannot
                pad, the link is unknown, or the posterior is a language model's.
        """
        self._check_H_init()
        options = (batch_size, link_approx, n_samples, generator, progress_bar)
        return predict(self, data, tokenizer, *options)

    def to(self, device: torch.device | str) -> LoraPosterior:
        """Move model and posterior to a device, in place, and return the posterior."""
        self.model.to(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor | LowRankKron | LowRankKronDecomposed):
                setattr(self, name, value.to(device))
        self._norms = None
        return self

    _memory_advice = (
        "lower `factor_rank`, set `modules` to cover fewer layers, or use DiagLoraLaplace"
    )

    def estimate_memory(self, batch: Any, n_examples: int | None = None) -> MemoryEstimate:
        """Estimate the memory of fits and predictions on batches like one, before the work.

        Runs the model forward on the first example. Print the result for advice.

        Args:
            batch: What the model takes.
            n_examples: Examples of the fit, where the posterior grows with them.
        """
        return estimate_memory(self, batch, n_examples)

    def curvature_size(self) -> int:
        """Return how many numbers the posterior's curvature holds."""
        return self.n_params

    def _curvature_bytes(self, n_examples: int | None, outputs: int) -> int:
        """Return the bytes of the device that the curvature takes."""
        return self._dtype.itemsize * self.curvature_size()

    @property
    def fits_by_jacobians(self) -> bool:
        """Whether a fit puts together each tensor's Jacobian, as a prediction does."""
        return True

    def weight_variance(self) -> Tensor:
        """Return the diagonal of the posterior covariance, ``(parameters,)``."""
        raise NotImplementedError
