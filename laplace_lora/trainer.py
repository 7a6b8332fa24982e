"""`LaplaceCallback`: a posterior at the end of `transformers.Trainer`'s training."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from laplace_lora.adapters.peft_files import folder_of_its_own
from laplace_lora.adapters.plain_names import active_adapters
from laplace_lora.adaptive.callbacks import AdaLoraCallback
from laplace_lora.data.distributed import together
from laplace_lora.data.draws import draws_kept
from laplace_lora.data.trainer_loaders import (
    whole_evaluation_loaders,
    whole_test_loader,
    whole_training_loader,
)
from laplace_lora.display.warning import warn
from laplace_lora.evaluation.beside_map import scores_beside_map
from laplace_lora.likelihoods.base import labels_tokens
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.posteriors.factored import KronLoraLaplace
from laplace_lora.posteriors.summary import with_known_term
from laplace_lora.storage.adapter_start import AdapterStart, start_of
from laplace_lora.trainer_checks import check_data_set, check_loaders, check_makes_predictions
from laplace_lora.trainer_loss import implied_likelihood, point_out_own_loss
from laplace_lora.trainer_reporters import reporters_behind

logger = logging.getLogger(__name__)
START = "start"


class LaplaceCallback(TrainerCallback):
    """Fits, tunes, logs and saves a posterior when training ends.

    Add it to the trainer that it is given::

        trainer = Trainer(model, ...)
        callback = LaplaceCallback(trainer)
        trainer.add_callback(callback)
        trainer.train()
        probs = callback.predict(test_dataset)  # in the order of its rows

    The posterior is fitted on the trainer's own training loader, with the examples that
    ``dataloader_drop_last`` leaves out of an epoch, its prior tuned as
    `optimize_prior_precision` does by default, and with it a regression's noise, unless
    ``sigma_noise`` is given. Through the trainer's logger go ``laplace_log_marginal_likelihood``
    and, with its gradient term where that is known, ``laplace_corrected_log_marginal_likelihood``,
    which tunings maximise; for a classifier with an evaluation set also
    ``eval_laplace_nll`` and ``eval_laplace_ece`` beside ``eval_map_nll`` and ``eval_map_ece``
    (nats per example, per label of a multi-label model, per labelled token; 15 equal-width bins);
    of several evaluation sets each has its name after ``eval_``.

    What can be checked is checked before the first step, where an error costs nothing. Whatever
    goes wrong after training is logged, and the adapter saved with the posterior, if there is one.

    Args:
        trainer: The trainer.
        likelihood: ``"classification"``, ``"multilabel"``, ``"regression"``,
            ``"reward_modeling"``, ``"language_modeling"``, ``"token_classification"`` or
            ``"question_answering"``; by default what the trainer trains: pairs with TRL's
            ``RewardTrainer``, texts with its ``SFTTrainer`` or with a causal language model
            without ``target_ids``, tokens with a token classifier, spans with a
            question-answering model, numbers or independent labels where the model's
            ``problem_type`` or its single output say so, classes otherwise.
        posterior: The posterior's class.
        save: Write the posterior into the trainer's output folder, where PEFT puts the adapter:
            one that is not called ``default`` has a folder of its name there.
        link_approx: Link of the predictive.
        strict: Raise what goes wrong after training, too.
        **kwargs: Arguments of the posterior, such as ``target_ids``. ``prior_mean`` is by default
            the adapter's weights at the first step, which are saved with the posterior, where a
            resumed training finds them; ``prior_mean="start"`` insists on them, a number leaves
            them out.

    Attributes:
        la: The posterior, ``None`` before training has ended.

    Raises:
        ValueError: If the likelihood is unknown, or no likelihood stands for the trainer's loss.
        TypeError: If the posterior's class has no `predict`, as `FunctionalLoraLLLaplace`.

    Warns:
        UserWarning: If no likelihood was given, and the trainer computes a loss of its own.
    """

    def __init__(
        self,
        trainer: Any,
        likelihood: str | None = None,
        posterior: Callable[..., LoraLaplace] = KronLoraLaplace,
        *,
        save: bool = True,
        link_approx: str = QUADRATURE,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        check_makes_predictions(posterior)
        self.trainer = trainer
        self.likelihood = implied_likelihood(trainer, kwargs) if likelihood is None else likelihood
        if likelihood is None:
            point_out_own_loss(trainer, self.likelihood, kwargs)
        self._objective = likelihood_of(self.likelihood)
        self.posterior = posterior
        self.save = save
        self.link_approx = link_approx
        self.strict = strict
        self.kwargs = kwargs
        self.la: LoraLaplace | None = None
        self._mean = kwargs.get("prior_mean")
        # The model whose start is known, and its adapter.
        self._begun: tuple[Callable[[], Any], set[str]] = (lambda: None, set())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model, and its loss on an example of each loader that will be used later.

        Raises:
            ValueError: If the model does not fit the likelihood, a loader is empty, without labels
                or with labels out of range, or the trainer has an `AdaLoraCallback`, too.
            TypeError: If a batch is neither mapping nor pair.

        Warns:
            UserWarning: In a search for hyperparameters.
        """
        self.la = None
        reporters_behind(self, self.trainer.callback_handler.callbacks)
        if state.is_hyper_param_search:
            warn(
                "LaplaceCallback fits nothing while hyperparameters are searched: train once more "
                "with the best ones, by trainer.train(), and the posterior is that training's"
            )
            return
        if any(isinstance(c, AdaLoraCallback) for c in self.trainer.callback_handler.callbacks):
            raise ValueError(
                "LaplaceCallback cannot go with AdaLoraCallback: it would fit pruned triplets, "
                "which a saved adapter lacks. Train with AdaLoraCallback alone, then call "
                "remove_pruned_triplets(model), fit a KronLoraLaplace, and save both"
            )
        self._keep_start(args, state)
        # Data sets and collators draw numbers; training is to see those it would have seen.
        with together(everyone=True), draws_kept():
            made = self.posterior(self.trainer.model, self.likelihood, **self.kwargs)
            check_makes_predictions(type(made))
            posterior = made.parts
            training = {"training": self.trainer.get_train_dataloader()}
            check_loaders(posterior, training | whole_evaluation_loaders(self.trainer))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fit, tune, save, evaluate and log; nothing in a search for hyperparameters."""
        if state.is_hyper_param_search:  # also called for trials that were cut short
            return
        try:
            with together(everyone=True):
                self._finish(args)
        except Exception:
            if self.save and args.should_save:
                self.trainer.model.save_pretrained(args.output_dir)
            if self.strict:
                raise
            outcome = "there is no posterior" if self.la is None else "the posterior is kept"
            logger.exception("training has ended, but the callback failed: %s", outcome)

    def _keep_start(self, args: TrainingArguments, state: TrainerState) -> None:
        """Make the adapter's weights at the first step of training the prior's mean."""
        by_default = self._mean is None
        model, adapters = self.trainer.model, active_adapters(self.trainer.model)
        known = self._begun[0]() is model and self._begun[1] == adapters
        if not (by_default or self._mean == START) or known:
            return
        self.kwargs.pop("prior_mean", None)  # of an earlier model, see the trainer's `model_init`
        if by_default and getattr(self.posterior, "_key", ("lora",))[0] != "lora":
            return  # a last-layer posterior has a head of its own, whose start is not known
        writes = self.save or not by_default
        try:
            if state.global_step > 0:  # resumed
                if not writes:
                    raise FileNotFoundError("what lies in the folder is another run's")
                start = self._start_before(args)
            else:
                start = start_of(model)
                if args.should_save and writes:
                    start.save_pretrained(self._folder(args))
        except (FileNotFoundError, ValueError):
            if not by_default:
                raise
            logger.info("the adapter's start is not known; the prior stands around zero")
            return
        self.kwargs["prior_mean"] = start
        self._begun = (weakref.ref(model), adapters)

    def _start_before(self, args: TrainingArguments) -> AdapterStart:
        """Read the start that a training left; earlier versions put that of any adapter above."""
        try:
            return AdapterStart.from_pretrained(self._folder(args))
        except FileNotFoundError:
            start = AdapterStart.from_pretrained(args.output_dir)
            trained = {n for n, p in self.trainer.model.named_parameters() if p.requires_grad}
            if trained <= set(start.tensors):
                return start
            raise

    def _folder(self, args: TrainingArguments) -> str:
        """Return where PEFT puts the adapter when the trainer saves it."""
        return os.path.join(args.output_dir, folder_of_its_own(self.trainer.model) or "")

    def _finish(self, args: TrainingArguments) -> None:
        la = self.posterior(self.trainer.model, self.likelihood, **self.kwargs)
        progress = False if args.disable_tqdm else None
        la.fit(whole_training_loader(self.trainer), progress_bar=progress)
        self.la = la
        try:
            tunes_noise = self._objective.has_noise and "sigma_noise" not in self.kwargs
            la.optimize_prior_precision(tune_sigma_noise=tunes_noise, progress_bar=progress)
        finally:
            if self.save and args.should_save:
                la.save_pretrained(self._folder(args))
        metrics = {"laplace_log_marginal_likelihood": la.log_marginal_likelihood().item()}
        corrected = with_known_term(la.fitted)
        if corrected is not None:
            metrics["laplace_corrected_log_marginal_likelihood"] = corrected
        self.trainer.log(metrics)
        if self._objective.is_classifier:
            for name, loader in whole_evaluation_loaders(self.trainer).items():
                scores = scores_beside_map(la, loader, self.link_approx, progress)
                self.trainer.log({f"{name}_{score}": value for score, value in scores.items()})

    def predict(self, dataset: Any) -> Any:
        """Return the posterior predictive of a data set, every row in its order.

        Args:
            dataset: As for ``trainer.predict``.

        Returns:
            Class probabilities ``(examples, classes)``, of a reward model for pairs, of a token
            classifier ``(examples, tokens, classes)``; for regression mean and covariance; of a
            question-answering model `SpanPredictions`.

        Raises:
            RuntimeError: If training has not ended.
            TypeError: If it is no data set, but a loader or texts.
        """
        la = self.la
        if la is None:
            raise RuntimeError("there is no posterior yet; it is fitted when training ends")
        check_data_set(dataset)
        loader = whole_test_loader(self.trainer, dataset)
        progress = False if self.trainer.args.disable_tqdm else None
        if labels_tokens(self._objective) or self._objective.has_spans:
            found: Any = la.predict(loader, link_approx=self.link_approx, progress_bar=progress)
            return found if self._objective.has_spans else found.probs
        with together(loader, device=la.fitted.device, runs=la.fitted.source) as team:
            batches = team.batches(loader, "Predicting", progress, la.fitted.by_example)
            parts = [self._predicted(la, batch) for batch in batches]
            names = ("p",) if self._objective.is_classifier else ("mean", "covariance")
            columns = {name: [part[i] for part in parts] for i, name in enumerate(names)}
            rows = tuple(team.rows(**columns).values())
            if not rows:
                raise ValueError("there is nothing to predict: the data set is empty")
        return rows[0] if self._objective.is_classifier else rows

    def _predicted(self, la: LoraLaplace, batch: Any) -> tuple[Tensor, ...]:
        """Return probabilities, or mean and covariance."""
        prediction = la(batch, link_approx=self.link_approx)
        moments = prediction if isinstance(prediction, tuple) else (prediction,)
        return tuple(moment.detach() for moment in moments)
