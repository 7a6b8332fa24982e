"""Compare the library with a model's own forward pass and autograd, or name what it refuses."""

import torch
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from support.batches import rows
from support.models import TARGETS

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
REFUSALS = (ValueError, RuntimeError, FloatingPointError)
EXAMPLE = 1  # the shortest of the batches below


def texts(lengths=(6, 3, 5), side="right", pad_to=8, eos=None):
    """Token sequences, padded on one side; they end with a token if it is given."""
    ids = torch.zeros(len(lengths), pad_to, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, length in enumerate(lengths):
        tokens = torch.randint(5, 50, (length,), generator=torch.Generator().manual_seed(n))
        if eos is not None:
            tokens[-1] = eos
        where = slice(0, length) if side == "right" else slice(pad_to - length, pad_to)
        ids[n, where], mask[n, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(batch, n):
    return rows(batch, slice(n, n + 1))


def unpadded(batch, n):
    """One example without its padding."""
    single = alone(batch, n)
    mask = single["attention_mask"]
    real = mask[0].bool()
    return {k: v[:, real] if v.shape == mask.shape else v for k, v in single.items()}


def outcome(model, batch, expected_inputs, pick, targets=None, dtype=torch.float64, fits=True):
    """Return ``"right"``, ``"diagonal"`` if it is only with diagonal blocks, or the refusal.

    Wrong numbers fail at once.

    Args:
        model: The PEFT model.
        batch: What the library gets.
        expected_inputs: From the batch and an index to what the model itself gets for an example.
        pick: From the model's output for it to ``(1, outputs)``.
        targets: Answer tokens.
        dtype: Of the model.
        fits: Compare posteriors fitted in batches of one and of all examples, too.
    """
    message = ""
    for uncovered in ("error", "diag"):
        wrapped = LogitsModel(model, target_ids=targets).eval()
        try:
            backend = LoraGGN(wrapped, "classification", uncovered=uncovered)
            jacobians, logits = backend.jacobians(batch)
            evidences = [evidence(wrapped, batch, size, uncovered) for size in (1, 3) if fits]
        except REFUSALS as error:
            message = message or f"{type(error).__name__}: {error}"
            latest = f"{type(error).__name__}: {error}"
            continue
        truth, gradients = differentiated(model, expected_inputs(batch, EXAMPLE), pick)
        assert float(gradients.norm()) > 1e-8, "the case says nothing: no gradient"
        check("logits", logits[EXAMPLE], truth, dtype)
        check("Jacobian", jacobians[EXAMPLE], gradients, dtype)
        if fits:
            check("evidence", *(e.reshape(1) for e in evidences), dtype)
        return "right" if uncovered == "error" else "diagonal"
    return latest


def check(what, ours, theirs, dtype):
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.1e}"


def differentiated(model, inputs, pick):
    """Return one example's outputs and their gradients, ``(outputs, parameters)``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:  # PEFT's hooks steer a training, and change no derivative
        p._backward_hooks = None
    outputs = pick(model(**inputs))[0]
    jacobian = []
    for output in outputs:
        gradients = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        parts = zip(parameters, gradients, strict=True)
        jacobian.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in parts])
        )
    return outputs.detach(), torch.stack(jacobian)


def evidence(wrapped, batch, size, uncovered):
    """Return the evidence of a posterior that was fitted in batches of a size."""
    count = len(next(iter(batch.values())))
    examples = [{k: v[n] for k, v in batch.items()} | {"labels": n % 3} for n in range(count)]
    la = KronLoraLaplace(wrapped, "classification", uncovered=uncovered)
    la.fit(DataLoader(examples, batch_size=size), evidence_correction=False)
    return la.log_marginal_likelihood().detach()


def answers(output):
    return output.logits[:, -1, TARGETS]


def logits(output):
    return output.logits
