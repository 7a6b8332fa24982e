"""The predictive from given factors: `jacobian_mean`, `variance`, `predict_probs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.discovery import trainable_maps
from laplace_lora.adapters.maps import wide_dtype
from laplace_lora.capture.gradient_flow import gradients_flow
from laplace_lora.capture.jacobians import jacobian_blocks
from laplace_lora.capture.recorder import record
from laplace_lora.data.batches import Batch
from laplace_lora.data.sharding import unwrapped
from laplace_lora.functional.factor_cache import Factors, check_ranks, checked_variance, decomposed
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.roots import identity_root
from laplace_lora.models.changes.autocast import as_called, in_full_precision
from laplace_lora.models.changes.compiled import eager
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.logits_model import LogitsModel


@in_full_precision
def jacobian_mean(
    model: nn.Module,
    batch_inputs: Mapping[str, Any],
    target_ids: Tensor | None = None,
    is_s2s: bool = False,
    output_callback: Callable[[Any], Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the Jacobian of the logits with respect to the trainable weights, and the logits.

    One forward pass, and one backward pass per logit for the whole batch, in evaluation mode.

    Args:
        model: A `PeftModel`, or any model whose trainable tensors belong to linear modules.
        batch_inputs: The model's keyword arguments.
        target_ids: Tokens whose next-token logits are wanted; ``None`` for all logits: a
            classifier's classes, or the whole vocabulary.
        is_s2s: Whether the model is an encoder-decoder; its logits are those of the first decoder
            step. A decoder's logits are those after the last real token.
        output_callback: From the model's output to logits ``(batch, outputs)``, used
            instead of ``target_ids`` and ``is_s2s``.

    Returns:
        For each trainable tensor, by name, ``(batch, outputs, *shape)``, with a `Conv1D` weight
        transposed to ``(out, in)`` like its factors; and logits ``(batch, outputs)``.

    Raises:
        ValueError: If ``is_s2s`` does not fit the model, both ``target_ids`` and
            ``output_callback`` are given, or nothing is trainable.
        RuntimeError: If an adapter is merged or disabled, a linear layer cuts the gradient, or a
            module runs on inputs of different shapes.
    """
    model = unwrapped(model)
    wrapped = _logits_model(model, target_ids, is_s2s, output_callback)
    maps, blocks = trainable_maps(model)
    named = list(model.named_modules())
    modules = [module for _, module in named]
    with evaluation_mode(model), eager(modules), as_called(), gradients_flow(named):
        tape = record(wrapped, maps, batch_inputs)
    f = tape.output
    dtype = wide_dtype([block.parameter for block in blocks])
    jacobian = {}
    for block, rows in zip(
        blocks, jacobian_blocks(tape, blocks, identity_root(f), dtype), strict=True
    ):
        transposed = maps[block.map].transposed and not block.is_bias
        jacobian[block.name] = rows.mT if transposed else rows
    return jacobian, f


@in_full_precision
def variance(
    inputs: Batch,
    jacobian: Mapping[str, Tensor],
    factors: Factors,
    s2: Tensor | float,
    n_logits: int,
    n_lora: int | None,
    n_kfac: int | None,
    device: torch.device | str,
) -> Tensor:
    """Return the covariance of the logits under the linearised model, ``J P⁻¹ Jᵀ``.

    Weights without factors are treated as fixed. Differentiable in ``s2``.

    Args:
        inputs: The batch of the Jacobian, only to check the number of examples.
        jacobian: From `jacobian_mean`.
        factors: From `calculate_kronecker_factors`; dense or low-rank, of any adapter ranks.
        s2: Prior variance, one positive number.
        n_logits: Number of logits.
        n_lora: As in `model_evidence`.
        n_kfac: As in `model_evidence`.
        device: Device of the result.

    Returns:
        Shape ``(batch, n_logits, n_logits)``.

    Raises:
        ValueError: If ``s2`` is not one positive number, a factor has no Jacobian or one of a
            different size, or the ranks or the numbers of examples or logits do not fit.
    """
    s2 = checked_variance(s2).to(device)
    check_ranks(factors, n_lora, n_kfac)
    precision = decomposed(factors, device) + 1 / s2.reshape(())
    parts = _jacobians(inputs, jacobian, factors, n_logits)
    return precision.covariance(rows.to(device) for rows in parts)


def _jacobians(
    inputs: Batch, jacobian: Mapping[str, Tensor], factors: Factors, n_logits: int
) -> Iterator[Tensor]:
    """Yield the Jacobian of each pair of factors, checked, see `variance`."""
    for name, (input_factor, grad_factor) in factors.items():
        rows = _jacobian_of(name, jacobian)
        if rows.shape[2:] == (len(grad_factor), len(input_factor) - 1):
            bias = _jacobian_of(name, jacobian, "bias")
            rows = torch.cat([rows, bias.unsqueeze(-1)], dim=-1)
        expected = (_examples(inputs, len(rows)), n_logits, len(grad_factor), len(input_factor))
        if rows.shape != expected:
            raise ValueError(
                f"the Jacobian of {name!r} has shape {tuple(rows.shape)}; {expected[0]} examples, "
                f"{n_logits} logits and its factors need {expected}"
            )
        yield rows


@in_full_precision
def predict_probs(
    f_mu: Tensor,
    f_var: Tensor,
    link_approx: str = "mc",
    n_samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return class probabilities ``E[softmax(f)]`` of Gaussian logits.

    The mean of the samples' probabilities, not the probabilities of their mean.

    Args:
        f_mu: Mean logits, ``(batch, classes)``, from `jacobian_mean`.
        f_var: Their covariance, ``(batch, classes, classes)``, from `variance`.
        link_approx: ``"mc"``, ``"quadrature"`` (the same integral without random numbers),
            ``"probit"``, ``"bridge"`` or ``"bridge_norm"``.
        n_samples: Samples for ``"mc"``.
        generator: Source of the samples, on the device of ``f_mu``.

    Returns:
        Shape ``(batch, classes)``.

    Raises:
        ValueError: If the link is unknown.
    """
    noise = None
    if link_approx == "mc":
        size = (n_samples, f_mu.shape[-1] - 1)
        noise = torch.randn(size, dtype=f_mu.dtype, device=f_mu.device, generator=generator)
    return Link(link_approx, noise).log_probabilities(f_mu, f_var).exp()


def _logits_model(
    model: nn.Module,
    target_ids: Tensor | None,
    is_s2s: bool,
    output_callback: Callable[[Any], Tensor] | None,
) -> LogitsModel:
    if output_callback is not None:
        return LogitsModel(model, target_ids, output_callback)
    wrapped = LogitsModel(model)
    if is_s2s != wrapped.is_encoder_decoder:
        kind = "an encoder-decoder" if wrapped.is_encoder_decoder else "no encoder-decoder"
        raise ValueError(f"is_s2s is {is_s2s}, but the model is {kind}")
    if wrapped.vocabulary_size is not None:
        all_ids = torch.arange(wrapped.vocabulary_size)
        return LogitsModel(model, all_ids if target_ids is None else target_ids)
    if target_ids is None:
        return wrapped
    return LogitsModel(model, output=lambda out: getattr(out, "logits", out)[:, target_ids])


def _jacobian_of(name: str, jacobian: Mapping[str, Tensor], kind: str = "weight") -> Tensor:
    """Return a module's Jacobian; one of the two names may have a wrapper's prefix."""
    wanted = f"{name}.{kind}"
    matches = [
        key for key in jacobian if f".{key}".endswith(f".{wanted}") or wanted.endswith(f".{key}")
    ]
    if wanted in jacobian or len(matches) == 1:
        return jacobian[wanted if wanted in jacobian else matches[0]]
    raise ValueError(
        f"there is a factor for {name!r}, but the Jacobian has {len(matches) or 'no'} tensors of "
        f"that name; it has {list(jacobian)[:4]}, ..."
    )


def _examples(inputs: Batch, default: int) -> int:
    """Return the number of examples in a batch of inputs."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return next((len(t) for t in tensors if isinstance(t, Tensor) and t.ndim), default)
