"""`calculate_kronecker_factors`: K-FAC factors of any linear modules over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from laplace_lora.adapters.maps import LinearMap, wide_dtype
from laplace_lora.adapters.peft_state import check_adapters
from laplace_lora.adapters.selection import listed
from laplace_lora.capture.gradient_flow import gradients_flow
from laplace_lora.capture.recorder import record
from laplace_lora.capture.tape import Tape
from laplace_lora.curvature.kfac import KfacSums
from laplace_lora.curvature.kfac_rows import KfacRows
from laplace_lora.data.batches import Batch, on_cpu
from laplace_lora.data.distributed import Together, together
from laplace_lora.data.masks import MASK_NAMES
from laplace_lora.data.sharding import unwrapped
from laplace_lora.display.warning import warn
from laplace_lora.functional.called_with import CalledMasks
from laplace_lora.functional.running_factors import factor_tensor
from laplace_lora.functional.selection import point_out_left_out, selected_maps
from laplace_lora.likelihoods.label_check import check_logits
from laplace_lora.likelihoods.roots import sampled_softmax_root, softmax_root
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.factors import map_shared
from laplace_lora.models.changes.autocast import as_called, in_full_precision
from laplace_lora.models.changes.compiled import eager
from laplace_lora.models.changes.modes import evaluation_mode, gradients_needed
from laplace_lora.models.changes.thread_hooks import own_hooks
from laplace_lora.models.inputs.unmasked import IDS, check_is_masked
from laplace_lora.models.score_head import score_head_narrowed
from laplace_lora.models.wrapped_model import base_of

EXACT_UP_TO = 256  # outputs; beyond it one backward pass per output is too many


@in_full_precision
def calculate_kronecker_factors(
    model: nn.Module,
    forward_call: Callable[[nn.Module, Any], Tensor],
    loader: Iterable[Batch],
    n_kfac: int | None = None,
    lr_threshold: int = 512,
    target_module_keywords: Sequence[str] = ("",),
    exclude_bias: bool = False,
    use_tqdm: bool | None = None,
    *,
    attention_mask: Callable[[Any], Tensor] | None = None,
    positions: str = "all",
    num_samples: int | None = None,
    match: str = "parts",
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum the Kronecker factors of a classifier's generalised Gauss-Newton matrix over a data set.

    The block of a module with weight ``(p, q)`` is approximately ``gradient factor ⊗ input
    factor``. Of modules without a bias both equal the factors of `KronLoraLaplace`, which has a
    block of its own for each bias; but that sees LoRA on the head of a language model only where
    the answer stands, and here it is seen at all tokens. They depend neither on the batch size nor
    on padding: *expand* over real tokens, the gradient factor a sum over examples, the input factor
    a mean. The head of a classifying decoder runs at the one token whose logits count. The model
    runs in evaluation mode; its modes, gradients and weights stay as they are.

    Modules that do not run are left out, as the logits do not depend on them.

    Args:
        model: Any module, a `PeftModel` or not.
        forward_call: From the model and a batch to logits ``(batch, classes)``.
        loader: Batches, in any form that ``forward_call`` takes; processes may share them.
        n_kfac: Rank of low-rank factors; ``None`` keeps all dense.
        lr_threshold: Sides shorter than this stay dense, and so do those that a sketch of
            ``2 n_kfac + 10`` columns would not make smaller.
        target_module_keywords: Selects `nn.Linear` and `Conv1D` modules, trainable or frozen, by
            whole parts of their names, separated by dots and underscores: ``"lora"`` selects
            ``lora_A`` and ``lora_B``. ``""`` selects all.
        exclude_bias: Treat biases as fixed. Otherwise a module's bias is the last column of its
            weight, its input factor ``(q + 1, q + 1)``.
        use_tqdm: Whether to show progress, see `progress`.
        attention_mask: From a batch to the ``(batch, tokens)`` mask of real tokens. ``None`` for
            the batch's ``attention_mask``, or else the one with which the model is called, or the
            transformer inside it, by name or by position. In an encoder-decoder it is the
            encoder's; the decoder's is ``decoder_attention_mask``, or all of its tokens.
        positions: ``"all"`` real tokens, or only the ``"last"`` one of each example.
        num_samples: Labels drawn per example, and backward passes per batch (Monte-Carlo Fisher).
            ``None`` for the exact matrix from ``classes − 1`` passes, or with more than 256
            outputs, such as a whole vocabulary, for one sample and a warning.
        match: ``"parts"``, or ``"substring"`` for bayesian_lora's keywords, see `selected_maps`.

    Returns:
        For each module name the input factor and the gradient factor: covariances ``(d, d)``, or
        roots ``(d, n_kfac)``.

    Raises:
        TypeError: If the keywords are a single string, or ``forward_call`` returns no tensor.
        ValueError: If a keyword selects no module, the loader is empty, the logits are not
            ``(batch, classes)`` with two classes or more, or are probabilities; if it is not known
            which tokens are real, or ``num_samples`` is not positive.
        RuntimeError: If the logits carry no gradient, a linear layer cuts it, a module runs on
            inputs of different shapes, none runs, or an adapter is merged or disabled.
        FloatingPointError: If a factor is not finite; names batch and layer.

    Warns:
        UserWarning: If keywords match trainable tensors that get no factor, as those of LoRA on
            embeddings.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    model = unwrapped(model)
    base: Any = base_of(model)
    check_adapters(model.named_modules())
    selected = selected_maps(model, target_module_keywords, exclude_bias, match)
    with_bias = {linear.name: has_bias for linear, has_bias in selected}
    maps = [linear for linear, _ in selected]
    weights: list[nn.Parameter] = [linear.module.weight for linear in maps]
    trained = {
        linear.name for linear, weight in zip(maps, weights, strict=True) if weight.requires_grad
    }
    dtype = wide_dtype(weights)
    known: dict[str, Any] = {}

    def run(batch: Any) -> Tensor:
        with as_called(), score_head_narrowed(base, batch):
            logits = forward_call(model, batch)
        if not isinstance(logits, Tensor):
            raise TypeError(
                "forward_call must return the logits, a tensor (batch, classes), got "
                f"{type(logits).__name__}; transformers' models have them in `.logits`"
            )
        return logits

    def added(sums: KfacSums | None, batch: Any) -> tuple[KfacSums, int]:
        nonlocal maps
        known.clear()
        called.begin()
        if attention_mask is not None:
            known[MASK_NAMES[0]] = attention_mask(batch)
        elif isinstance(batch, Mapping):
            known.update({k: batch[k] for k in MASK_NAMES if batch.get(k) is not None})
        # What the model is called with is known when it has been.
        masks_of = partial(called.of, given=known, is_sure=attention_mask is not None)
        with gradients_flow(list(model.named_modules())) if sums is None else nullcontext():
            tape = record(run, maps, batch, masks_of, sums is None, module=model)
        check_logits(tape.output, "forward_call")
        looked_at = set()
        for linear, x in zip(tape.maps, tape.inputs, strict=True):
            masks = masks_of(linear.name)
            if masks.get(MASK_NAMES[0]) is None and id(masks.get(IDS)) not in looked_at:
                looked_at.add(id(masks.get(IDS)))
                text = masks if masks.get(IDS) is not None else batch
                config = called.config_of(linear.name)
                check_is_masked(text, config, "Kronecker factors would count it")
            called.check(linear.name, x, known)
        columns = _columns(tape.output, num_samples)
        if sums is None:
            ran = {linear.name for linear in tape.maps}
            _point_out_others(tape, columns, [m for m in maps if m.name in trained - ran])
            maps = list(tape.maps)
            _check_some_ran(maps, selected)
            homogeneous = [with_bias[linear.name] for linear in maps]
            rows, spec = KfacRows(positions=positions), FactorSpec(n_kfac, lr_threshold - 1)
            sums = KfacSums.empty(tape, spec, dtype, rows, homogeneous)
        sums.update(tape, columns)
        return sums, len(tape.output)

    with (
        own_hooks() as hooks,
        together(loader, runs=model) as team,
        evaluation_mode(model),
        eager(list(model.modules())),
        gradients_needed(weights),
    ):
        called = CalledMasks(model, hooks.on_input, needed=lambda: not known)
        sums, n = _summed(added, loader, team, use_tqdm)
    tensors = map_shared([list(pair) for pair in sums.covariances(n)], factor_tensor)
    return {linear.name: (x, g) for linear, (x, g) in zip(maps, tensors, strict=True)}


def _summed(
    added: Callable[[KfacSums | None, Any], tuple[KfacSums, int]],
    loader: Iterable[Batch],
    team: Together,
    use_tqdm: bool | None,
) -> tuple[KfacSums, int]:
    """Return the sums over the data of all processes, and the number of examples."""
    sums, n, example = None, 0, None
    for index, batch in enumerate(team.batches(loader, "Factors", use_tqdm)):
        if team.shared and example is None:
            example = on_cpu(batch)
        try:
            sums, count = added(sums, batch)
        except FloatingPointError as error:
            raise FloatingPointError(f"batch {index}: {error}") from error
        n += count
    if not all(team.all_of(n > 0)):
        example = team.any_of(example)
        if example is None:
            raise ValueError("the loader is empty")
        if sums is None:  # others' examples show what sums there are
            sums, _ = added(None, example)
            for tensor in sums.tensors():
                tensor.zero_()
    assert sums is not None
    team.add_up(sums.tensors())
    return sums, int(team.total(n)[0])


def _check_some_ran(maps: Sequence[LinearMap], selected: Sequence[tuple[LinearMap, bool]]) -> None:
    if not maps:
        names = listed([linear.name for linear, _ in selected])
        raise RuntimeError(
            f"none of the selected modules ({names}) ran in forward_call, so there is nothing to "
            "sum. Call the model that forward_call gets, not another one (a compiled one around "
            "it, a copy), or select modules that run"
        )


def _point_out_others(tape: Tape, columns: Tensor, maps: Sequence[LinearMap]) -> None:
    """Warn of maps that did not run as layers, and on which the logits depend all the same.

    PEFT adds some adapters to a weight in each pass, as those of `nn.MultiheadAttention`.
    """
    if maps:
        weights = [linear.module.weight for linear in maps]
        grads = tape.backward(columns[:1], lambda *_: None, weights)
        pairs = zip(maps, grads, strict=True)
        point_out_left_out(f"{linear.name}.weight" for linear, grad in pairs if grad is not None)


def _columns(f: Tensor, num_samples: int | None) -> Tensor:
    if num_samples is None and f.shape[-1] <= EXACT_UP_TO:
        return softmax_root(f)
    if num_samples is None:
        num_samples = 1
        warn(
            f"forward_call returns {f.shape[-1]} logits per example, so the curvature is a "
            "Monte-Carlo estimate from one label per example; return the answers' logits for an "
            "exact one, or set `num_samples`",
        )
    return sampled_softmax_root(f, num_samples)
