"""Saved posteriors: how large the file is, and what rounding costs after loading.

A K-FAC posterior over a checkpoint of `benchmarks.study.trainings` is fitted, saved in the ways
that the library offers, and loaded. Beside them stand ways that it does not offer, of which only
the curvature is changed: eigenvectors of other dtypes, fewer of them, and rounded sums that are
decomposed anew. All share the Jacobians of the same test rows. Errors are against the posterior
that was fitted, at the prior precisions of ``--priors``: the largest difference of a probability,
the mean relative difference of the covariance of a row's logits, and the difference in the log
evidence, in nats.

    python -m benchmarks.accuracy.saved --data DATA --out OUT
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import arguments
from benchmarks.harness.report import write_report
from benchmarks.study.judging import fitted
from benchmarks.study.trainings import Training
from laplace_lora import KronLoraLaplace
from laplace_lora.likelihoods.links import Link
from laplace_lora.linalg.eigen import Eigen
from laplace_lora.linalg.factors import DenseFactor, map_shared
from laplace_lora.linalg.rounded import orthonormal
from laplace_lora.linalg.sketch import Factor, LowRankFactor
from laplace_lora.predictive.glm import Predictor
from laplace_lora.storage.files import TENSORS
from laplace_lora.structures.posterior import Posterior

HALF = 2  # bytes of a number
BATCH = 20
Changed = Callable[[Factor, Eigen], tuple[Eigen, int]]


def without_sums(factor: Factor, eigen: Eigen) -> tuple[Eigen, int]:
    """Keep eigenpairs as they are, and their bytes."""
    return eigen, eigen.vectors.nbytes


def with_vectors(dtype: torch.dtype) -> Changed:
    """Return how eigenvectors come back from another dtype."""

    def changed(factor: Factor, eigen: Eigen) -> tuple[Eigen, int]:
        rounded = eigen.vectors.to(dtype)
        vectors = orthonormal(rounded, eigen.vectors.dtype)
        return replace(eigen, vectors=vectors), rounded.nbytes

    return changed


def in_bytes(factor: Factor, eigen: Eigen) -> tuple[Eigen, int]:
    """Round every eigenvector to whole multiples of a 127th of its largest entry."""
    scale = eigen.vectors.abs().amax(0) / 127
    rounded = (eigen.vectors / scale).round() * scale
    return replace(eigen, vectors=orthonormal(rounded, eigen.vectors.dtype)), rounded.numel()


def half_as_many(factor: Factor, eigen: Eigen) -> tuple[Eigen, int]:
    """Keep the leading half of a low-rank side's eigenvectors, as float16."""
    kept = eigen
    if isinstance(factor, LowRankFactor):
        order = eigen.values.argsort(descending=True)[: len(eigen.values) // 2]
        left_out = factor.trace - eigen.values[order].sum()
        residual = (left_out / (eigen.d - len(order))).to(eigen.residual)
        kept = Eigen(eigen.vectors[:, order], eigen.values[order], residual)
    return with_vectors(torch.float16)(factor, kept)


def half_sums(factor: Factor, eigen: Eigen) -> tuple[Eigen, int]:
    """Round the sums to float16, triangles of the dense ones, and decompose them anew."""
    if isinstance(factor, LowRankFactor):
        sums = _rounded(factor.sketch)
        anew = LowRankFactor(sums, factor.trace, factor.rank).decompose()
        return anew, HALF * sums.numel()
    assert isinstance(factor, DenseFactor)
    sums = _rounded(factor.matrix)
    return DenseFactor(sums).decompose(), HALF * factor.d * (factor.d + 1) // 2


def _rounded(sums: Tensor) -> Tensor:
    top = sums.abs().max() / 2**15
    return (sums / top).half().to(sums.dtype) * top


WAYS: dict[str, Changed] = {
    "eigenvectors in float32": without_sums,
    "eigenvectors in bfloat16": with_vectors(torch.bfloat16),
    "eigenvectors in 8 bits": in_bytes,
    "half as many eigenvectors": half_as_many,
    "sums in float16": half_sums,
}


def changed_posterior(posterior: Posterior, change: Changed) -> tuple[Posterior, int]:
    """Return a posterior with other eigenpairs, and the bytes of what they come from."""
    curvature = posterior.state.curvature
    factors = curvature.factors.kfacs
    pairs = [
        [(factor, eigen) for factor, eigen in zip(block, sides, strict=True)]
        for block, sides in zip(factors, curvature.eigen.blocks, strict=True)
    ]
    done: dict[int, tuple[Eigen, int]] = {}
    for factor, eigen in (pair for block in pairs for pair in block):
        if id(factor) not in done:
            done[id(factor)] = change(factor, eigen)
    blocks = map_shared(factors, lambda factor: done[id(factor)][0])
    eigen = type(curvature.eigen)(blocks)
    state = replace(posterior.state, curvature=replace(curvature, eigen=eigen))
    return replace(posterior, state=state), sum(bytes_ for _, bytes_ in done.values())


def posteriors(la: KronLoraLaplace) -> dict[str, tuple[Posterior, float]]:
    """Return the posterior of every way, and the bytes of its file."""
    found = {}
    for precision in ("exact", "half"):
        with tempfile.TemporaryDirectory() as folder:
            la.save_pretrained(folder, precision=precision)
            loaded = KronLoraLaplace.from_pretrained(la.logits_model, folder)
            found[precision] = loaded.fitted, (Path(folder) / TENSORS).stat().st_size
    _, vectors = changed_posterior(la.fitted, with_vectors(torch.float16))
    other = found["half"][1] - vectors  # gradient, eigenvalues and configuration
    for name, change in WAYS.items():
        posterior, size = changed_posterior(la.fitted, change)
        found[name] = posterior, other + size
    return found


@torch.no_grad()
def errors(
    exact: Posterior, ways: dict[str, tuple[Posterior, float]], loader: Any, priors: list[float]
) -> list[dict[str, Any]]:
    """Return the errors of every way at every prior precision, over the rows of a loader."""
    readout, link = exact.objective.readout(None, contrasts=True), Link("quadrature")
    cells, moments = [], Predictor(exact)
    for prior in priors:
        delta = exact.settings.prior_precision.new_tensor([prior])
        settings = replace(exact.settings, prior_precision=delta)
        at_prior = {"": exact.with_settings(settings)}
        at_prior |= {
            name: posterior.with_settings(settings) for name, (posterior, _) in ways.items()
        }
        cells.append((prior, at_prior))
    differences: dict[tuple[str, float], list[tuple[Tensor, Tensor]]] = {}
    for batch in loader:
        mean, jacobians = moments.readout_jacobians(batch, readout)
        blocks = list(jacobians)
        for prior, at_prior in cells:
            found = {name: p.precision.covariance(blocks) for name, p in at_prior.items()}
            truth = found.pop("")
            p = link.log_probabilities(mean, truth, readout.relative).exp()
            for name, covariance in found.items():
                own = link.log_probabilities(mean, covariance, readout.relative).exp()
                norms = [x.flatten(1).norm(dim=1) for x in (covariance - truth, truth)]
                pair = (own - p).abs().amax(1), norms[0] / norms[1]
                differences.setdefault((name, prior), []).append(pair)
    rows = []
    for name, prior in differences:
        probability, covariance = map(torch.cat, zip(*differences[name, prior], strict=True))
        own, truth = (log_det(dict(cells)[prior][key]) for key in (name, ""))
        figures = {"probability": float(probability.max()), "covariance": float(covariance.mean())}
        rows.append({"way": name, "prior": prior, **figures, "evidence": 0.5 * abs(own - truth)})
    return rows


def log_det(posterior: Posterior) -> float:
    """Return ``log det P - log det P0``."""
    prior, scale = posterior.settings.prior_precision, posterior.scale
    ratio = posterior.structure.log_det_ratio(posterior.state.curvature, prior, scale)
    return float(ratio)


def table_rows(
    ways: dict[str, tuple[Posterior, float]], found: list[dict[str, Any]]
) -> list[dict[str, str]]:
    """Return a line for every way: the largest errors over the prior precisions."""
    rows = []
    for name, (_, size) in ways.items():
        row = {"way": name, "MB": f"{size / 1e6:.1f}"}
        for error in ("probability", "covariance", "evidence"):
            row[error] = f"{max(each[error] for each in found if each['way'] == name):.1e}"
        rows.append(row)
    return rows


def main() -> None:
    parser = arguments.plain_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' folders")
    parser.add_argument("--out", type=Path, default=arguments.RESULTS / "study")
    parser.add_argument("--model", default="decoder", choices=["decoder", "encoder"])
    parser.add_argument("--task", default="sst2", help="of a checkpoint that was trained")
    parser.add_argument("--length", default="short", choices=["short", "long"])
    parser.add_argument("--priors", type=float, nargs="+", default=[1.0, 10.0, 100.0, 1000.0])
    parser.add_argument("--rows", type=int, default=100, help="test rows")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.set_defaults(repeats=1, seed=0)
    args = parser.parse_args()
    arguments.prepare(args)
    training = Training(args.model, args.task, args.length, args.seed)
    task, _, la = fitted(training, args.data, args.out, args.device)
    rows = [row for i, row in enumerate(task.splits["test"]) if i % 4 == 0][: args.rows]
    loader = DataLoader(rows, BATCH, collate_fn=task.collate)
    ways = posteriors(la)
    found = errors(la.fitted, ways, loader, args.priors)
    write_report("accuracy.saved", args, {"Saved size and errors": table_rows(ways, found)}, found)


if __name__ == "__main__":
    main()
