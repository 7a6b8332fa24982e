"""`LaplaceCallback`: a posterior at the end of `transformers.Trainer`'s training."""

from __future__ import annotations

from collections.abc import Callable
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
        posterior: Callable[..., LoraLaplace] = KronLoraLaplace,
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
        self.la: LoraLaplace | None = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fit, tune, log and save."""
        model: nn.Module = self.trainer.model
        la = self.posterior(model, self.likelihood, **self.kwargs)
        progress = not args.disable_tqdm
        la.fit(self.trainer.get_train_dataloader(), progress_bar=progress)
        la.optimize_prior_precision()
        self.la = la
        metrics = {"laplace_log_marginal_likelihood": la.log_marginal_likelihood().item()}
        if self.trainer.eval_dataset is not None and not self._regresses:
            metrics |= self._scores(la, self.trainer.get_eval_dataloader(), progress)
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
        la = self.la
        if la is None:
            raise RuntimeError("there is no posterior yet; it is fitted when training ends")
        loader = self.trainer.get_test_dataloader(dataset)
        progress = not self.trainer.args.disable_tqdm
        batches = local_batches(loader, "Predicting", progress, la.fitted.by_example)
        parts = [self._predicted(la, batch) for batch in batches]
        gather = gather_for(loader)
        columns = [gather(torch.cat(column)) for column in zip(*parts, strict=True)]
        return tuple(columns) if self._regresses else columns[0]

    def _predicted(self, la: LoraLaplace, batch: Any) -> tuple[Tensor, ...]:
        """Return probabilities, or mean and covariance."""
        prediction = la(batch, link_approx=self.link_approx)
        moments = prediction if isinstance(prediction, tuple) else (prediction,)
        return tuple(moment.detach() for moment in moments)

    def _scored(self, la: LoraLaplace, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels, and probabilities under posterior and MAP."""
        (p,) = self._predicted(la, batch)
        with torch.no_grad(), evaluation_mode(la.model):
            return la.fitted.split(batch)[1], p, la.model(batch).softmax(-1)

    def _scores(self, la: LoraLaplace, loader: Any, progress: bool) -> dict[str, float]:
        batches = local_batches(loader, "Evaluating", progress, la.fitted.by_example)
        parts = [self._scored(la, batch) for batch in batches]
        gather = gather_for(loader)
        labels, *predicted = (gather(torch.cat(column)) for column in zip(*parts, strict=True))
        metrics: dict[str, float] = {}
        for name, p in zip(("laplace", "map"), predicted, strict=True):
            metrics |= {f"eval_{name}_nll": nll(p, labels), f"eval_{name}_ece": ece(p, labels)}
        return metrics
