"""`save_pretrained` and `from_pretrained`: a posterior as two files beside its adapter.

``laplace.safetensors`` holds the tensors, ``laplace_config.json`` everything else with a hash of
both. Nothing is ever unpickled, and no path is read from a file. How a posterior is put into
tensors belongs to the posterior classes, by `packing`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from laplace_lora.curvature.backends import LoraEF, LoraGGN
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.storage.files import CONFIG, TENSORS, VERSION, checksum, read_files, write_whole
from laplace_lora.storage.fingerprint import check_identity, identity

BACKENDS = {backend.__name__: backend for backend in (LoraGGN, LoraEF)}
SCALARS = ("loss", "n_data", "n_outputs", "covariance_scale", "likelihood_temperature")
Posterior = TypeVar("Posterior", bound="Saving")


class Saving:
    """Saving half of a posterior; subclasses say how their curvature becomes tensors."""

    def _packed(self) -> tuple[dict[str, Tensor], Any]:
        """Return the curvature as tensors, and a description that JSON can hold."""
        curvature: Any = self.curvature  # type: ignore[attr-defined]
        return {"matrix": curvature}, list(curvature.shape)

    def _unpack(self, tensors: Mapping[str, Tensor], description: Any) -> None:
        """Install a packed curvature; raise ValueError or KeyError for what does not fit."""
        la: Any = self
        (curvature,) = tensors.values()
        sides = [la.n_params] * (2 if la._key[1] == "full" else 1)
        if list(curvature.shape) != sides or description != sides:
            raise ValueError(f"the curvature has shape {list(curvature.shape)}, not {sides}")
        la._install(curvature)

    @property
    def _unpack_device(self) -> torch.device:
        """Where a packed curvature is unpacked."""
        return self._device  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``laplace.safetensors`` and ``laplace_config.json`` into a folder.

        Each file is written under another name first and renamed when complete. Save the adapter
        itself with ``peft_model.save_pretrained``, into the same folder if you like.

        Args:
            save_directory: The folder; made if missing.

        Raises:
            AttributeError: If the posterior has not been fitted.
            TypeError: If the backend is a class of your own, which a file cannot name.
        """
        la: Any = self
        la._check_H_init()
        backend = la._backend_cls.__name__
        if BACKENDS.get(backend) is not la._backend_cls:
            raise TypeError(f"a posterior with the backend {backend} cannot be saved")
        tensors, description = self._packed()
        tensors = {f"curvature.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {name: getattr(la, name) for name in ("prior_precision", "prior_mean")}
        tensors["sigma_noise"] = torch.as_tensor(la.sigma_noise).reshape(1)
        payload = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        config = {
            "version": VERSION,
            "class": type(self).__name__,
            "arguments": la.arguments(),
            "backend": backend,
            "output": la.logits_model.output is not None,
            "scalars": {name: getattr(la, name) for name in SCALARS},
            "curvature": description,
            **identity(la),
            "tensors": hashlib.sha256(payload).hexdigest(),
        }
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / TENSORS, payload)
        text = json.dumps({**config, "checksum": checksum(config)}, indent=1)
        write_whole(folder / CONFIG, text.encode())

    @classmethod
    def from_pretrained(
        cls: type[Posterior], model: nn.Module, directory: str | os.PathLike[str], **options: Any
    ) -> Posterior:
        """Restore a posterior, bit for bit, around the model that it was fitted on.

        Args:
            model: The same `PeftModel`, with the same adapter active; or the same `LogitsModel`
                around it where an ``output`` callable was used.
            directory: Folder with the two files, or the name of a repository on the hub.
            **options: The constructor's arguments that no file holds, such as ``storage``.

        Returns:
            The posterior, on the model's device.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, altered or of an unknown version, if it was saved by
                another class, or if weights, base model or adapter are others.
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
            backend = BACKENDS[config["backend"]]
            if isinstance(model, LogitsModel):
                arguments.pop("target_ids")
            elif config["output"]:
                raise ValueError(
                    "the posterior was fitted on a LogitsModel with an `output` callable, which "
                    "no file can hold; pass such a LogitsModel instead of the PeftModel"
                )
            la = constructor(model, backend=backend, **arguments, **options)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{CONFIG} describes no posterior: {error!r}") from None
        check_identity(config, identity(la))
        try:
            tensors = load(payload)
            for name, tensor in tensors.items():
                if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                    raise ValueError(f"tensor {name!r} is not finite")
            tensors = {name: tensor.to(la._unpack_device) for name, tensor in tensors.items()}
            _restore(la, tensors, config)
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{TENSORS} does not fit {CONFIG}: {error}") from None
        return la

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the two files to a repository on the hub, beside an adapter that is there.

        Args:
            repo_id: ``"user/name"``; created if missing.
            **kwargs: Arguments of `huggingface_hub.HfApi.upload_folder`, such as ``token``,
                ``commit_message`` and ``revision``; ``private`` goes to ``create_repo``.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            options = {"commit_message": "Upload Laplace posterior", **kwargs}
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def _restore(la: Any, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Fill a new posterior from tensors that are known to be finite."""
    prefix = "curvature."
    curvature = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    precision, noise = tensors["prior_precision"], tensors["sigma_noise"]
    if not bool((precision > 0).all()) or not bool((noise > 0).all()):
        raise ValueError("prior precision and noise must be positive")
    scalars = config["scalars"]
    for name in SCALARS:
        value = scalars[name]
        whole = name.startswith("n_")
        if type(value) is not (int if whole else float) or (whole and value < 1):
            raise ValueError(f"{name} is {value!r}")
    if not (math.isfinite(scalars["covariance_scale"]) and scalars["covariance_scale"] > 0):
        raise ValueError("the covariance scale is not positive")
    if not (
        math.isfinite(scalars["likelihood_temperature"]) and scalars["likelihood_temperature"] > 0
    ):
        raise ValueError("the likelihood temperature is not positive")
    la._unpack(curvature, config["curvature"])
    la._settle(scalars["loss"], scalars["n_data"], scalars["n_outputs"])
    la.prior_precision = precision
    la.prior_mean = tensors["prior_mean"]
    la.sigma_noise = noise
    la.covariance_scale = scalars["covariance_scale"]
    la.likelihood_temperature = scalars["likelihood_temperature"]
