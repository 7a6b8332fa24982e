"""`SavedLaplace`: files, state dictionaries and copies of a posterior."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import nn

from laplace_lora.adapters.configuration import function_settings
from laplace_lora.adapters.frozen_values import frozen_values
from laplace_lora.adapters.peft_files import point_out_cut_layers
from laplace_lora.adapters.selection import covering
from laplace_lora.curvature.backend import LoraCurvature
from laplace_lora.curvature.backends import LoraEF, LoraGGN
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.posteriors.card import card_section
from laplace_lora.posteriors.copies import deep_copy, refuse_pickling, shallow_copy
from laplace_lora.posteriors.served import ServedLaplace
from laplace_lora.posteriors.state_dicts import read_state, state_entries
from laplace_lora.storage.archive import PRECISIONS, TUNING, load_state, save_posterior
from laplace_lora.storage.files import CONFIG, read_files
from laplace_lora.storage.hub import upload
from laplace_lora.storage.model_card import Report
from laplace_lora.structures.state import PosteriorState
from laplace_lora.tuning.outcome import record_of, tuning_from

BACKENDS: dict[str, type[LoraCurvature]] = {kind.__name__: kind for kind in (LoraGGN, LoraEF)}
BUFFERS, ADAPTER = "buffers", "adapter"
ANSWERS = ("target_ids", "mask_token_id")  # arguments that a `LogitsModel` brings itself
RESTORED = ("backend", "prior_precision", "prior_mean", "sigma_noise")  # beside the arguments
Self = TypeVar("Self", bound="SavedLaplace")


class SavedLaplace(ServedLaplace):
    """How a posterior leaves the process and comes back; the work is done by `storage`."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], precision: str = PRECISIONS[0]
    ) -> None:
        """Write ``laplace.safetensors`` and ``laplace_config.json`` into a folder.

        Each file is written under another name first and renamed when complete. Save the adapter
        itself with ``peft_model.save_pretrained``, into the same folder if you like.

        Args:
            save_directory: The folder; made if missing.
            precision: ``"half"`` rounds eigenvectors, rows and gradients to float16 and leaves out
                sums that eigenpairs determine; eigenvalues, traces and all settings keep their
                digits. ``"exact"`` keeps every number, in about five times the room.

        Raises:
            AttributeError: If the posterior has not been fitted.
            TypeError: If the backend is a class of your own, which a file cannot name.
            ValueError: If ``precision`` is neither.
            RuntimeError: If the adapter is merged, disabled or not active, so that no model would
                be recognised as the one that was fitted.

        Warns:
            UserWarning: If PEFT saves the adapter without triplets that AdaLoRA has pruned, so that
                the posterior can be loaded around the unpruned model alone.
        """
        self._weights_watch.look_again()
        posterior, backend = self.fitted, self._backend_cls.__name__
        if BACKENDS.get(backend) is not self._backend_cls:
            raise TypeError(f"a posterior with the backend {backend} cannot be saved")
        point_out_cut_layers(posterior.source.model)
        with in_turn(self.logits_model):
            save_posterior(posterior, Path(save_directory), backend, precision, self._record())

    @classmethod
    @in_full_precision
    def from_pretrained(
        cls: type[Self], model: nn.Module, directory: str | os.PathLike[str], **options: Any
    ) -> Self:
        """Restore a posterior around the model that it was fitted on, bit for bit if saved so.

        It covers the tensors that it covered, even if others that were frozen are trainable now.

        Args:
            model: The same `PeftModel`, with the same adapter active; or the same `LogitsModel`
                around it where an ``output`` callable was used.
            directory: Folder with the two files, or the name of a repository on the hub.
            **options: The constructor's arguments that no file holds, such as ``storage``.

        Returns:
            The posterior, on the model's device.

        Raises:
            FileNotFoundError: If a file is missing.
            TypeError: If the class has no such option.
            ValueError: If a file is damaged, altered or of an unknown version, if it was saved by
                another class, if an option is what the file restores, if weights, base model or
                adapter are others, or if a `LogitsModel` reads other outputs of the model: it has
                other ``target_ids``, another ``mask_token_id``, or an ``output`` callable where the
                fitted one had none.
            RuntimeError: If the adapter is merged, disabled or not active.
        """
        payload, config = read_files(directory)
        if config["class"] != cls.__name__:
            raise ValueError(
                f"{directory} holds a {config['class']}; load it with "
                f"{config['class']}.from_pretrained"
            )
        constructor: Any = cls
        try:
            arguments = dict(config["arguments"])
            _check_not_restored(options, arguments)
            backend = BACKENDS[config["backend"]]
            if isinstance(model, LogitsModel):
                answers = {name: arguments.pop(name, None) for name in ANSWERS}
                _check_reads_the_same(model, answers, config["output"])
            elif config["output"]:
                raise ValueError(
                    "the posterior was fitted on a LogitsModel with an `output` callable, which "
                    "no file can hold; pass such a LogitsModel instead of the PeftModel"
                )
            with covering(config.get("parameters") or ()):
                la: Self = constructor(model, backend=backend, **arguments, **options)
        except (KeyError, TypeError) as error:
            unknown = [name for name in options if repr(name) in str(error)]
            if unknown:
                raise TypeError(f"{cls.__name__} has no option {unknown[0]!r}") from None
            raise ValueError(f"{CONFIG} describes no posterior: {error!r}") from None
        with in_turn(model):
            la._install(load_state(la.parts, payload, config))
        la._recall(config.get(TUNING))
        return la

    def push_to_hub(
        self,
        repo_id: str,
        precision: str = PRECISIONS[0],
        report: Report | Sequence[Report] = (),
        **kwargs: Any,
    ) -> str:
        """Upload the two files to a repository on the hub, beside an adapter that is there.

        A section of the model card then says what the posterior is, how it was tuned and how it is
        loaded; the rest of the card stays as it is.

        Args:
            repo_id: ``"user/name"``; created if missing.
            precision: ``"half"`` or ``"exact"``, see `save_pretrained`.
            report: What `evaluation.evaluate` says of it on held-out data, perhaps after reports
                of other methods: the card gets a table of all, and a picture of the last if
                matplotlib is installed.
            **kwargs: Arguments of `huggingface_hub.HfApi.upload_folder`, such as ``token``,
                ``commit_message`` and ``revision``; ``private`` goes to ``create_repo``.

        Returns:
            The address of the commit.
        """
        reports = list(report) if isinstance(report, Sequence) else [report]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder, precision)
            evidence = float(self.log_marginal_likelihood().detach())
            facts = (self.fitted, evidence, self.tuning)
            text = card_section(*facts, repo_id, reports, folder)
            return upload(folder, repo_id, text, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return laplace-torch's state, the curvature as tensors, with what a calibration chose."""
        posterior = self.fitted
        state = posterior.state
        at_fit = {BUFFERS: dict(state.frozen), ADAPTER: dict(state.adapter)}
        tuning = {TUNING: self._record()}
        return {**super().state_dict(), **state_entries(posterior), **at_fit, **tuning}

    @in_full_precision
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a posterior of the same class and arguments, at its weights.

        With its ``temperature`` and ``enable_backprop``, whatever the constructor was given.

        Raises:
            ValueError: If the state is of another class, likelihood or number of weights.
        """
        frozen, adapter = map(state_dict.get, (BUFFERS, ADAPTER))
        if frozen is None:  # those of earlier versions have none
            frozen = frozen_values(self.logits_model, self.parts.engine.parameters)
        if adapter is None:
            adapter = function_settings(self.logits_model)
        state = read_state(self.parts, state_dict)
        self._install(replace(state, frozen=frozen, adapter=adapter))
        self._recall(state_dict.get(TUNING))
        self.temperature = state_dict["temperature"]
        self.enable_backprop = state_dict["enable_backprop"]

    def __copy__(self: Self) -> Self:
        return shallow_copy(self)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return deep_copy(self, self.logits_model, memo)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickling(self)

    def _install(self, state: PosteriorState) -> None:
        raise NotImplementedError

    def _record(self) -> dict[str, Any] | None:
        return None if self.tuning is None else record_of(self.tuning)

    def _recall(self, record: Mapping[str, Any] | None) -> None:
        """Take over what `_record` said; earlier versions said nothing."""
        if record is not None:
            self._tuning = tuning_from(record, self.prior_precision.detach().clone())


def _check_not_restored(options: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse options that a file decides about: they would have no effect.

    Raises:
        ValueError: If there is one.
    """
    for name in options:
        if name in RESTORED or name in arguments:
            raise ValueError(
                f"{name!r} is restored from the file, as it was when the posterior was saved; load "
                "without it (prior and noise can be set on the posterior afterwards)"
            )


def _check_reads_the_same(model: LogitsModel, saved: Mapping[str, Any], has_output: bool) -> None:
    """Refuse a `LogitsModel` with other outputs than those that a posterior was fitted on.

    Raises:
        ValueError: If ``target_ids`` or the mask token are others, or one has an ``output``
            callable and the other has not.
    """
    if has_output != (model.output is not None):
        had, has = ("an", "none") if has_output else ("no", "one")
        raise ValueError(
            f"the posterior was fitted on a model with {had} `output` callable, and the given "
            f"LogitsModel has {has}; pass one that reads the same outputs"
        )
    ids = None if model.target_ids is None else model.target_ids.tolist()
    by_model = getattr(model.config, "mask_token_id", None)  # where none was given
    for name, now, default in (
        ("target_ids", ids, None),
        ("mask_token_id", model.mask_token_id, by_model),
    ):
        then = saved[name]
        if (default if then is None else then) != (default if now is None else now):
            raise ValueError(
                f"the posterior was fitted with {name}={then}, and the given LogitsModel has "
                f"{name}={now}; pass LogitsModel(model, {name}={then}), or the PeftModel alone"
            )
