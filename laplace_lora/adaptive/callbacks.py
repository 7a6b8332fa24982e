"""Callbacks for `transformers.Trainer`: IVON's draws, and AdaLoRA's rank allocation."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, PeftModel
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from laplace_lora.adaptive.accumulated_loss import COUNT, AccumulatedLoss, copies
from laplace_lora.adaptive.allocation import (
    ScoreAllocator,
    adalora_components,
    check_final,
    pattern_from_zeros,
    set_importance_score,
    trained_adapter,
)
from laplace_lora.adaptive.checkpoints import (
    load_best_state,
    load_sensitivities,
    save_sensitivities,
)
from laplace_lora.adaptive.ivon import IVON, ivon_of
from laplace_lora.adaptive.scores import (
    Components,
    ImportanceScore,
    PosteriorScore,
    SensitivityScore,
)
from laplace_lora.adaptive.shared_draws import share_draws
from laplace_lora.adaptive.training_checks import check_parameters, check_settings
from laplace_lora.display.warning import warn


class IVONCallback(TrainerCallback):
    """Draws weights at the start of every training step and restores the mean before IVON's step.

    Give it to a `Trainer` whose optimiser is an `IVON` (``optimizers=(ivon, None)``), with
    ``max_grad_norm=0``. If training fails in between, call ``ivon.restore()``.

    With several accumulation steps transformers leaves the gradients of models whose loss ignores
    the number of items, as most classifiers' does, summed over the steps, not averaged, which
    would make the curvature too large; with several processes (DDP) it multiplies them by the
    processes' number. Both are undone, and all processes draw the same weights.

    Args:
        gradient_scale: Factor of a step's accumulated gradients that makes them those of the mean
            loss; ``None`` to infer it from the gradient that reaches the model's loss. It must be
            given with several accumulation steps or processes if the trainer computes its loss
            outside of the model (an overridden ``compute_loss``, ``compute_loss_func``): 1 if the
            loss is divided by ``num_items_in_batch`` or the trainer divides it by the steps, ``1 /
            gradient_accumulation_steps`` if it is each step's mean and nothing divides it.
    """

    def __init__(self, gradient_scale: float | None = None) -> None:
        self.gradient_scale = gradient_scale
        self._substeps = 0
        self._ivon: IVON | None = None
        self._loss = AccumulatedLoss()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimiser, and refuse settings that would bias it.

        A checkpoint to resume from is loaded by now.

        Raises:
            ValueError: If gradients are clipped, checkpoints are written in the middle of a step,
                the optimiser does not hold a parameter that the model trains, or processes would
                draw different weights.
        """
        self._loss.stop()
        self._loss = AccumulatedLoss()
        self._ivon = ivon_of(kwargs.get("optimizer"))
        if self._ivon is not None:
            check_settings(args, self._ivon.sync)
            check_parameters(kwargs["model"], self._ivon)
            share_draws(self._ivon, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw weights, the same for all micro-batches of a step."""
        self._substeps = 1
        if self._ivon is not None:
            self._ivon.restore()
            self._ivon.draw()
            if self.gradient_scale is None and (
                args.gradient_accumulation_steps > 1 or copies(args) > 1
            ):
                self._loss.watch(kwargs["model"])

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count micro-batches."""
        self._substeps += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the mean, and collect the gradients computed at the draw.

        Raises:
            ValueError: If the factor of accumulated gradients is neither given nor to be seen.
        """
        if self._ivon is None:
            return
        scale = self.gradient_scale
        if scale is None and not _smooths_by_items(args):
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # accelerate's
            factor = 1.0 if scaler is None else scaler.get_scale()
            scale = self._loss.scale(kwargs["model"], args, self._substeps, factor)
        if scale not in (None, 1):
            for group in self._ivon.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(scale)
        self._ivon.restore(collect=True)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the mean if training stops between a step's micro-batches."""
        if self._ivon is not None:
            self._ivon.restore()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that the mean is in place, and the curvature that belongs to it."""
        if self._ivon is not None:
            self._ivon.restore()
            load_best_state(args, state, kwargs["model"], self._ivon)


class AdaLoraCallback(IVONCallback):
    """Allocates AdaLoRA's ranks while a `Trainer` trains, with IVON or any other optimiser.

    Checkpoints from the middle of the schedule can be resumed. After training the final ranks are
    in the adapter's configuration, where PEFT expects them.

    Args:
        score: Importance of the triplets: a score, the name of a criterion on the posterior of
            the trainer's IVON, or ``"sensitivity"``, with the smoothings of the adapter's
            configuration.
        gradient_scale: As in `IVONCallback`.
    """

    def __init__(
        self, score: ImportanceScore | str = "sensitivity", gradient_scale: float | None = None
    ) -> None:
        super().__init__(gradient_scale)
        self.score = score
        self._allocator: ScoreAllocator | None = None
        self._final: dict[str, list[bool]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the score, and resume where a checkpoint left off.

        Raises:
            TypeError: If the model is not an AdaLoRA model in training.
            ValueError: If the schedule does not end within the training, a criterion is named
                without IVON, gradients are clipped with it, the optimiser does not hold the
                adapter, or a checkpoint lacks its state or has another's.
        """
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        adapter, config = trained_adapter(model)
        optimizer = kwargs.get("optimizer")
        is_flat = getattr(args, "deepspeed", None)  # which joins parameters
        if optimizer is not None and self._ivon is None and not is_flat:  # IVON's are checked
            check_parameters(model, optimizer, "lora_")
        final_step = config.total_step - config.tfinal
        if final_step >= state.max_steps:
            raise ValueError(
                f"the ranks become final at step {final_step} (total_step={config.total_step}, "
                f"tfinal={config.tfinal}), but training ends after {state.max_steps} steps; set "
                f"total_step to {state.max_steps}"
            )
        score = self._resolved(optimizer, config)
        self._allocator = set_importance_score(model, score)
        self._final = config.rank_pattern = None
        if state.global_step > final_step:
            self._final = pattern_from_zeros(model, adapter)
            check_final(self._final, config)
        elif state.global_step and isinstance(score, SensitivityScore):
            load_sensitivities(score, _components(model, adapter), _folder(args, state))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the step, and mask if one is due; PEFT counts steps from zero."""
        tuner, config = kwargs["model"].base_model, trained_adapter(kwargs["model"])[1]
        config.rank_pattern = self._final
        tuner.update_and_allocate(state.global_step)
        # With a pattern PEFT would save a shrunken adapter, from which training cannot continue.
        self._final, config.rank_pattern = config.rank_pattern, None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save running sensitivities with a checkpoint; a posterior is the optimiser's state."""
        score = None if self._allocator is None else self._allocator.score
        folder, model = _folder(args, state), kwargs["model"]
        if isinstance(score, SensitivityScore) and score.averages and folder.is_dir():
            save_sensitivities(score, _components(model, trained_adapter(model)[0]), folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the final ranks into the adapter's configuration."""
        super().on_train_end(args, state, control, **kwargs)
        adapter, config = trained_adapter(kwargs["model"])
        if self._final is not None:
            left = pattern_from_zeros(kwargs["model"], adapter)
            beyond = [
                name
                for name, keep in left.items()
                if any(now and not then for now, then in zip(keep, self._final[name], strict=True))
            ]
            if beyond:  # PEFT would save the adapter without these triplets, another function
                warn(
                    "load_best_model_at_end brought back a checkpoint from before the ranks were "
                    f"final: {sum(map(sum, left.values()))} triplets are left, not "
                    f"{sum(map(sum, self._final.values()))}; prune_adapter brings them down"
                )
                self._final = left
        config.rank_pattern = self._final

    def _resolved(self, optimizer: Optimizer | None, config: AdaLoraConfig) -> ImportanceScore:
        if not isinstance(self.score, str):
            return self.score
        if self.score == "sensitivity":
            return SensitivityScore(config.beta1, config.beta2)
        ivon = ivon_of(optimizer)
        if ivon is None:
            raise ValueError(
                f"the criterion {self.score!r} needs a posterior: give the Trainer an IVON "
                "optimiser, or the callback a PosteriorScore"
            )
        return PosteriorScore(ivon, self.score)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _components(model: PeftModel, adapter: str) -> list[Components]:
    return adalora_components(model.base_model.model, adapter)


def _smooths_by_items(args: TrainingArguments) -> bool:
    """Return whether the trainer smooths labels, and divides by the number of items.

    Older versions of transformers average over the micro-batch.
    """
    taken = inspect.signature(LabelSmoother.__call__).parameters
    return bool(args.label_smoothing_factor) and COUNT in taken
