"""Other Laplace posteriors as baselines, each fitted and tuned by one call."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.utils.data import DataLoader

from laplace_lora.evaluation.baseline_likelihoods import likelihood_name
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.posteriors.factored import DiagLoraLaplace
from laplace_lora.posteriors.last_layer import KronLoraLLLaplace

Posterior = TypeVar("Posterior", bound=LoraLaplace)


def last_layer_laplace(
    model: nn.Module, train_loader: DataLoader[Any], **kwargs: Any
) -> KronLoraLLLaplace:
    """Fit a last-layer Laplace posterior and tune its prior by leave-one-out.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        train_loader: Training batches with labels.
        **kwargs: Arguments of `KronLoraLLLaplace`; ``likelihood`` is what the model's configuration
            says, unless given.
    """
    return _tuned(KronLoraLLLaplace, model, train_loader, kwargs)


def diagonal_laplace(
    model: nn.Module, train_loader: DataLoader[Any], **kwargs: Any
) -> DiagLoraLaplace:
    """Fit a diagonal Laplace posterior over the adapter and tune its prior likewise.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        train_loader: Training batches with labels.
        **kwargs: Arguments of `DiagLoraLaplace`, as above.
    """
    return _tuned(DiagLoraLaplace, model, train_loader, kwargs)


def _tuned(
    cls: type[Posterior], model: nn.Module, train_loader: DataLoader[Any], kwargs: dict[str, Any]
) -> Posterior:
    kwargs.setdefault("likelihood", likelihood_name(LogitsModel.wrap(model)))
    la = cls(model, **kwargs)
    la.fit(train_loader)
    la.optimize_prior_precision()
    return la
