"""`ServedLaplace`: samples of a posterior as ordinary adapters, which any engine serves."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laplace_lora.adapters.peft_files import check_saves_adapters, point_out_no_mixed_batches
from laplace_lora.data.distributed import is_sharded, together
from laplace_lora.data.shares import is_main
from laplace_lora.data.subset import Subset
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.posteriors.tuned import TunedLaplace
from laplace_lora.predictive.network_samples import NetworkSamples
from laplace_lora.predictive.weight_sampling import sampled_network
from laplace_lora.storage.served_adapters import check_folder, write_adapters
from laplace_lora.structures.settings import check_positive
from laplace_lora.tuning.texts.served_width import CRITERIA, ServedWidth, choose_width

EXAMPLES = 256  # of the training data, at most
ADVICE = (
    "average the softmax of logits / temperature over the adapters; the manifest's width holds for "
    "all of them together; with PEFT, batches of several adapters (adapter_names) are for LoRA "
    "alone"
)


@dataclass(frozen=True)
class ServedAdapters:
    """Adapters that were exported.

    Attributes:
        folder: Where they are, with the manifest ``laplace_adapters.json``.
        adapters: The folder of each.
        width: How wide the samples are, and how that was chosen.
        temperature: What divides logits before the softmax.
    """

    folder: Path
    adapters: list[Path]
    width: ServedWidth
    temperature: float

    def __str__(self) -> str:
        return f"{len(self.adapters)} adapters in {self.folder}: {self.width}"


class ServedLaplace(TunedLaplace):
    """How a posterior is served without this library."""

    @in_full_precision
    def export_adapters(
        self,
        folder: str | os.PathLike[str],
        k: int = 8,
        *,
        loader: Any = None,
        criterion: str | None = None,
        width: float | None = None,
        seed: int = 0,
        progress_bar: bool | None = None,
    ) -> ServedAdapters:
        """Write samples of the weights as PEFT adapters, whose averaged softmax is the predictive.

        Each is an adapter of the same configuration as the model's own, with the same ranks, in
        antithetic pairs around the posterior's mean. Whatever loads such adapters serves them.
        Their average approximates the linearised predictive; the networks are not linear in their
        weights, so the samples are narrower than the posterior, by a factor of its covariance that
        is chosen here: by the NLL of labels, or such that the average is as uncertain as the
        linearised predictive. The model is not changed.

        Args:
            folder: Where the adapters go; an earlier export there is replaced.
            k: How many.
            loader: What the width is chosen on, in a pass per sample and width: validation batches,
                best with labels. ``None``: at most 256 training examples, by entropy, as long as
                this process keeps them.
            criterion: ``"nll"`` of labels, or ``"entropy"``; ``None`` for the first where there are
                labels in ``loader``.
            width: Factor of the posterior's covariance; chosen if ``None``.
            seed: Of the samples.
            progress_bar: Whether to show progress, see `progress`.

        Raises:
            AttributeError: If the posterior has not been fitted.
            FileExistsError: If the folder holds anything but an earlier export.
            TypeError: If the model is no `PeftModel`.
            ValueError: If the posterior is over a last layer of its own, the model is sharded,
                PEFT does not write a tensor of the posterior with the adapter, the criterion is
                unknown, or no width is given where none can be chosen.

        Warns:
            UserWarning: If the samples of no width are better than the mean alone, none is as
                uncertain as the linearised predictive, or PEFT's batches of several adapters do
                not work with this kind of adapter.
        """
        posterior, target = self.fitted, Path(folder)
        if posterior.last_layer is not None:
            raise ValueError(
                f"a {posterior.kind} has a head of its own, which no adapter holds; export a "
                "posterior over the adapter's weights, such as KronLoraLaplace, which covers a "
                "head that the adapter trains (modules_to_save)"
            )
        check_saves_adapters(posterior.source.model)
        check_folder(target)
        point_out_no_mixed_batches(posterior.source.model)
        samples = NetworkSamples(posterior, k, seed)
        if width is not None:
            if loader is not None or criterion is not None:
                raise ValueError("give either a `width`, or a `loader` to choose it on")
            check_positive("width", width)
            chosen = ServedWidth(float(width), "given")
        else:
            if criterion not in (None, *CRITERIA):
                raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
            if loader is None:
                loader, criterion = self._some_training_data(criterion), "entropy"
            with together(loader, device=posterior.device, runs=posterior.source) as team:
                chosen = choose_width(samples, loader, criterion, team, progress_bar)
        temperature = posterior.settings.likelihood_temperature
        description = {
            "posterior": posterior.kind,
            "likelihood": posterior.objective.name,
            "target_ids": posterior.arguments["target_ids"],
            "n_data": posterior.state.n_data,
            "seed": seed,
            "temperature": temperature,
            "width": asdict(chosen),
            "use": ADVICE,
        }
        adapters = [target / f"sample_{i}" for i in range(k)]
        if is_main():
            with sampled_network(posterior) as (twin, own):
                model, names = twin.get_submodule("model"), posterior.names
                weights = samples.weights(chosen.width)
                adapters = write_adapters(target, model, own, names, weights, description)
        return ServedAdapters(target, adapters, chosen, temperature)

    def _some_training_data(self, criterion: str | None) -> Any:
        """Return training data to match entropies on.

        Raises:
            ValueError: If they are not at hand, or the NLL of their labels is asked for.
        """
        loader, posterior = self._train_loader, self.fitted
        if loader is None:
            raise ValueError(
                "the width is chosen on data, and the training data are not at hand: give "
                "`loader`, or a `width`"
            )
        if criterion == "nll":
            raise ValueError(
                "the NLL of labels that were trained on says nothing of a width; give `loader` "
                "with others"
            )
        if is_sharded(loader):
            return loader
        forms = (posterior.by_example, posterior.divides)
        return list(Subset(loader, posterior.state.n_data, EXAMPLES, *forms))
