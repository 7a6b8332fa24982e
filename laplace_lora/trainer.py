"""`LaplaceCallback`: a posterior at the end of `transformers.Trainer`'s training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from laplace_lora.data.distributed import gather_for
from laplace_lora.data.loaders import local_batches
from laplace_lora.evaluation.metrics import ece, nll
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.posteriors.factored import KronLoraLaplace


class LaplaceCallback(TrainerCallback):
    """Fits, tunes, logs and saves a posterior when training ends.

    Add it to the trainer that it is given::

        trainer = Trainer(model, ...)
        callback = LaplaceCallback(trainer)
        trainer.add_callback(callback)
        trainer.train()
        probs = callback.predict(test_dataset)  # rows as those of trainer.predict(test_dataset)

    The posterior is fitted on the trainer's own training loader, its prior tuned by the marginal
    likelihood. Through the trainer's logger go ``laplace_log_marginal_likelihood`` and, for a
    classifier with an evaluation set, ``eval_laplace_nll`` and ``eval_laplace_ece`` beside
    ``eval_map_nll`` and ``eval_map_ece`` (nats per example; 15 equal-width bins).

    Args:
        trainer: The trainer.
        likelihood: ``"classification"``, ``"regression"`` or ``"reward_modeling"``.
        posterior: The posterior's class.
        save: Write the posterior into the trainer's output folder.
        link_approx: Link of the predictive.
        **kwargs: Arguments of the posterior, such as ``target_ids``.

    Attributes:
        la: The posterior, ``None`` before training has ended.
    """

    def __init__(
        self,
        trainer: Any,
        likelihood: str = "classification",
        posterior: type[LoraLaplace] = KronLoraLaplace,
        *,
        save: bool = True,
        link_approx: str = QUADRATURE,
        **kwargs: Any,
    ) -> None:
        self.trainer = trainer
        self._regresses = likelihood_of(likelihood).has_noise
        self.likelihood = likelihood
        self.posterior = posterior
        self.save = save
        self.link_approx = link_approx
        self.kwargs = kwargs
        self.la: Any = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fit, tune, log and save."""
        model: nn.Module = self.trainer.model
        la: Any = self.posterior(model, self.likelihood, **self.kwargs)
        progress = not args.disable_tqdm
        la.fit(self.trainer.get_train_dataloader(), progress_bar=progress)
        la.optimize_prior_precision()
        self.la = la
        metrics = {"laplace_log_marginal_likelihood": la.log_marginal_likelihood().item()}
        if self.trainer.eval_dataset is not None and not self._regresses:
            metrics |= self._scores(self.trainer.get_eval_dataloader(), progress)
        self.trainer.log(metrics)
        if self.save and args.should_save:
            la.save_pretrained(args.output_dir)

    def predict(self, dataset: Any) -> Any:
        """Return the posterior predictive of a data set, in its order.

        Args:
            dataset: As for ``trainer.predict``.

        Returns:
            Class probabilities ``(examples, classes)``, of a reward model for pairs; for
            regression mean and covariance.

        Raises:
            RuntimeError: If training has not ended.
        """
        if self.la is None:
            raise RuntimeError("there is no posterior yet; it is fitted when training ends")
        loader = self.trainer.get_test_dataloader(dataset)
        if not self._regresses:
            return self._collected(loader, self._laplace, not self.trainer.args.disable_tqdm)
        parts = [self.la(batch) for batch in local_batches(loader, "Predicting")]
        gather = gather_for(loader)
        return tuple(gather(torch.cat(column)) for column in zip(*parts, strict=True))

    def _laplace(self, batch: Mapping[str, Any]) -> Tensor:
        return self.la(batch, link_approx=self.link_approx)

    @torch.no_grad()
    def _map(self, batch: Mapping[str, Any]) -> Tensor:
        with evaluation_mode(self.la.model):
            return self.la.model(batch).softmax(-1)

    def _collected(self, loader: Any, predict: Callable[[Any], Tensor], progress: bool) -> Tensor:
        batches = local_batches(loader, "Predicting", progress, self.la.fitted.by_example)
        parts = [predict(batch).detach() for batch in batches]
        return gather_for(loader)(torch.cat(parts))

    def _scores(self, loader: Any, progress: bool) -> dict[str, float]:
        labels = self._collected(loader, lambda batch: self.la.fitted.split(batch)[1], False)
        metrics: dict[str, float] = {}
        for name, predict in (("laplace", self._laplace), ("map", self._map)):
            p = self._collected(loader, predict, progress)
            metrics |= {f"eval_{name}_nll": nll(p, labels), f"eval_{name}_ece": ece(p, labels)}
        return metrics
