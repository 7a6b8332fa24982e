"""Parts of the subspaces in which the evidence's gradient term is measured."""

from dataclasses import replace


def first(subspace, m):
    """What the first ``m`` directions say."""
    return replace(
        subspace,
        grams=subspace.grams[:, :m, :m],
        curvature=subspace.curvature[:m, :m],
        gradient=subspace.gradient[:m],
        displacement=subspace.displacement[:, :m],
    )
