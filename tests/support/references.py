"""Explicit loops over examples and outputs, which the library is compared with."""

import torch
from torch import nn
from torch.func import functional_call, jacrev

from support.batches import rows, validation


def assert_near(ours, theirs, tolerance=1e-6):
    """Compare by norm: Llama normalises in single precision, whatever its dtype."""
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert_near(x, y, tolerance)
        return
    assert ours.shape == theirs.shape
    error, size = (ours - theirs).norm().item(), theirs.norm().item()
    assert error <= tolerance * size + 1e-13, f"error {error:.2e} of {size:.2e}"


def explicit_jacobians(model: nn.Module, batch) -> list[torch.Tensor]:
    """Jacobians of every trainable tensor by `torch.func.jacrev`, ``(batch, outputs, *shape)``."""
    transformer = getattr(model.eval(), "model", None)
    if hasattr(transformer, "set_attn_implementation"):
        transformer.set_attn_implementation("eager")
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    return list(jacrev(lambda w: functional_call(model, w, (batch,)))(weights).values())


def looped_jacobians(model, batch):
    """One autograd call an example and output: the reference."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = []
    for n in range(len(batch["labels"])):
        f = model(rows(batch, slice(n, n + 1)))[0]
        grads = [
            torch.autograd.grad(out, parameters, retain_graph=True, allow_unused=True) for out in f
        ]
        zero = [torch.zeros_like(p) for p in parameters]
        result.append(
            torch.stack(
                [
                    torch.cat(
                        [(z if g is None else g).flatten() for g, z in zip(grad, zero, strict=True)]
                    )
                    for grad in grads
                ]
            )
        )
    return torch.stack(result)


def explicit_ggn(model, batch):
    """The classifier's GGN over all trainable weights, from `looped_jacobians`."""
    J = looped_jacobians(model, batch)
    p = model(batch).softmax(-1)
    Lambda = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("ncp,nck,nkq->pq", J, Lambda, J)


def block_diagonal_part(matrix, model):
    """Keep the blocks of each trainable tensor with itself."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    parts, at = [], 0
    for size in sizes:
        parts.append(matrix[at : at + size, at : at + size])
        at += size
    return torch.block_diag(*parts)


def validation_nll(la, link="quadrature"):
    """Mean NLL of the validation examples, from one prediction each."""
    total, count = 0.0, 0
    for batch in validation(8):
        p = la(batch, link_approx=link, generator=torch.Generator().manual_seed(0))
        total -= p[range(len(p)), batch["labels"]].log().sum().item()
        count += len(p)
    return total / count
