"""Eigenvalue-corrected posteriors and the dense matrices they must equal."""

import torch

from laplace_lora import KronLoraLaplace
from support.batches import loader
from support.models import TARGETS, peft_model
from support.posteriors import DENSE, LOW
from support.references import explicit_jacobians

ZERO = {**LOW, "residual": "zero"}
REDUCE = {"backend_kwargs": {"kfac_approx": "reduce"}}
OPTIONS = [DENSE, LOW, ZERO, {**LOW, **REDUCE}]


def corrected_posterior(
    model="bert", likelihood="classification", correct=True, cls=KronLoraLaplace, **kw
):
    targets = TARGETS if model == "llama-lm" else None
    model = peft_model(model) if isinstance(model, str) else model
    return cls(model, likelihood, target_ids=targets, eigenvalue_correction=correct, **kw)


def fit_corrected(*args, data=None, **kwargs):
    la = corrected_posterior(*args, **kwargs)
    la.fit(loader() if data is None else data)
    return la


def exact_blocks(la, batch, outer=None):
    """The curvature's diagonal blocks from Jacobians of `torch.func.jacrev`."""
    f = la.model.eval()(batch)
    if outer is None:
        p = f.softmax(-1)
        outer = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    rows = [J.flatten(2) for J in explicit_jacobians(la.model, batch)]
    return [torch.einsum("nca,ncd,ndb->ab", J, outer.detach(), J) for J in rows]


def blocks_of(decomposed):
    matrix, start, blocks = decomposed.to_matrix(), 0, []
    for size in decomposed._sizes():
        blocks.append(matrix[start : start + size, start : start + size])
        start += size
    return blocks


def whole_basis(side):
    """The kept eigenvectors, then others that complete them, and where those begin."""
    U = side.vectors
    complete = torch.linalg.svd(U, full_matrices=True)[0][:, U.shape[1] :]
    return torch.cat([U, complete], 1), U.shape[1]


def diagonal_part(sides, matrix, residual="isotropic"):
    """The diagonal of a matrix in an eigenbasis; directions left out share the mean of theirs."""
    (U, k), (V, l) = [*map(whole_basis, sides), (matrix.new_ones(1, 1), 1)][:2]
    basis = torch.kron(U, V)
    table = (basis.T @ matrix @ basis).diagonal().reshape(len(U), len(V)).clone()
    for rows in (slice(0, k), slice(k, None)):
        for columns in (slice(0, l), slice(l, None)):
            part = table[rows, columns]
            if residual == "zero" and slice(None) != rows and (rows.start or columns.start):
                part.zero_()
            if rows.start and part.numel():
                part[:] = part.mean(0, keepdim=True)
            if columns.start and part.numel():
                part[:] = part.mean(1, keepdim=True)
    return basis @ table.flatten().diag() @ basis.T
