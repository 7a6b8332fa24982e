"""Leave-one-out of independent labels: an example with all its labels is left out."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.tuning.left_out.linear_model import LinearModel
from support.batches import rows
from support.multilabel import multilabel_batch, multilabel_posterior
from support.references import assert_near


def test_leave_one_out_leaves_out_all_labels_of_an_example():
    """Of a linear model whose labels are all known but one, against refits without each row."""
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (6, 3), generator=generator)
    y[2, 1] = -100
    offset = torch.zeros(6, 3, dtype=torch.float64)
    objective = likelihood_of("multilabel")

    def linear(keep):
        rows = J[keep].flatten(0, 1)
        return LinearModel(rows @ rows.T, offset[keep], y[keep], objective, False)

    everything = torch.ones(6, dtype=torch.bool)
    found = linear(everything)
    mode = found.mode(50.0)
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def loss():
        steps.zero_grad()
        value = objective.nll(torch.einsum("ncp,p->nc", J, weights), y) + 25 * weights @ weights
        value.backward()
        return value

    steps.step(loss)
    assert_near(mode.outputs, torch.einsum("ncp,p->nc", J, weights.detach()))
    mean, covariance = found.leave_one_out(mode)
    for n in range(6):
        keep = everything.clone()
        keep[n] = False
        without = linear(keep).mode(50.0)
        w = torch.einsum("nc,ncp->p", without.coefficients, J[keep]) / 50.0
        torch.testing.assert_close(mean[n], J[n] @ w, atol=5e-3, rtol=0)
        p = without.outputs.sigmoid()
        curved = torch.where(y[keep] == -100, 0, p * (1 - p))
        H = torch.einsum("nc,ncp,ncq->pq", curved, J[keep], J[keep]) + 50 * torch.eye(4).double()
        torch.testing.assert_close(covariance[n], J[n] @ H.inverse() @ J[n].T, atol=5e-3, rtol=0)


def test_data_of_which_no_label_is_known_are_refused():
    """They say nothing: every prior has a loss of 0, and the first of a grid used to win."""
    la = multilabel_posterior()
    before = la.prior_precision.clone()
    unknown = {**multilabel_batch(), "labels": torch.full((7, 3), torch.nan)}
    data = DataLoader([rows(unknown, n) for n in range(7)], batch_size=4)
    for call in (
        lambda: la.fit(data),
        lambda: la.fit(data, override=False),
        lambda: la.calibrate(data, progress_bar=False),
        lambda: la.optimize_prior_precision(method="gridsearch", val_loader=data),
        lambda: la.optimize_prior_precision(method="val_gd", val_loader=data),
        lambda: la.recentre(1.0, train_loader=data),
    ):
        with pytest.raises(ValueError, match=r"no label of the (training )?data is known"):
            call()
    assert torch.equal(la.prior_precision, before) and la.n_data == 7
    with pytest.raises(ValueError, match="the loader is empty"):
        la.calibrate([], progress_bar=False)
