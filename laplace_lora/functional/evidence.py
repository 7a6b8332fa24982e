"""The evidence from given factors: `model_evidence`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from laplace_lora.data.sharding import unwrapped
from laplace_lora.functional.factor_cache import Factors, check_ranks, checked_variance, decomposed
from laplace_lora.models.changes.autocast import in_full_precision


@in_full_precision
def model_evidence(
    model: nn.Module,
    LL: Tensor,
    factors: Factors,
    n_lora: int | None,
    n_kfac: int | None,
    s2: Tensor | float,
) -> Tensor:
    """Return the Laplace approximation of the log evidence, to be maximised over ``s2``.

    ``LL − ½ ‖θ‖²/s2 − ½ Σ log(1 + s2 e)`` over the eigenvalues ``e`` of all blocks, as
    `KronLoraLaplace.log_marginal_likelihood` at prior precision ``1/s2`` (with
    ``residual="zero"`` where a factor is low-rank). Differentiable in ``s2`` and ``LL``.

    Args:
        model: The model for which the factors were computed; ``θ`` are the weights they cover.
        LL: Log likelihood of the training data, summed over the examples, in nats.
        factors: From `calculate_kronecker_factors`.
        n_lora: LoRA rank, or ``None``. Only checked: ranks are read from the factors, which may
            have several, and a rank that no factor has is an error.
        n_kfac: Rank of low-rank factors, or ``None``. Only checked against the roots.
        s2: Prior variance, one positive number.

    Returns:
        The log evidence in nats, of the shape of ``s2``.

    Raises:
        ValueError: If ``s2`` is not one positive number, a module is not in the model or differs
            in size from its factors, or the ranks do not fit.
    """
    s2 = checked_variance(s2)
    check_ranks(factors, n_lora, n_kfac)
    square: Tensor | float = 0.0
    for name, (inputs, grads) in factors.items():
        try:
            module: Any = unwrapped(model).get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the model has no module {name!r}, for which there is a factor"
            ) from None
        weights = [module.weight]
        if module.bias is not None and len(inputs) * len(grads) != module.weight.numel():
            weights.append(module.bias)
        if len(inputs) * len(grads) != sum(weight.numel() for weight in weights):
            raise ValueError(
                f"the factors of {name!r} have sides {len(inputs)} and {len(grads)}, but its "
                f"weight has shape {tuple(module.weight.shape)}"
            )
        square = square + sum(w.detach().double().square().sum().to(s2.device) for w in weights)
    ratio = (decomposed(factors, s2.device) + 1 / s2.reshape(())).log_det_ratio()
    return LL - 0.5 * square / s2 - 0.5 * ratio
