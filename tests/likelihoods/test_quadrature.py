"""The integrated softmax: errors, gradients, and what it must not depend on."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from torch.nn import functional as F

from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.quadrature import (
    covariance_root,
    normal_points,
    softmax_log_probabilities,
)
from laplace_lora.likelihoods.sigmoid import binary_log_probabilities

DEVIATIONS = (0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0, 3.0, 10.0, 25.0, 50.0)
MEANS = (-50.0, -31.0, -12.0, -7.0, -0.3, 0.0, 0.3, 4.0, 17.0, 50.0)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def adaptive(mean, deviation):
    """``E[σ(f)]`` by adaptive quadrature between break points, to 1e-12 of its size."""
    if deviation < 1e-8:  # the next term of the expansion is a 1e-16th
        return float(expit(mean))

    def integrand(z):
        density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return density * float(expit(mean + deviation * z))

    step = -mean / deviation
    peak = min(max(step, 0.0), deviation)
    ends = (min(-12.0, peak - 12), max(12.0, peak + 12))
    near = [peak + d for d in (-3, -1, 0, 1, 3)] + [step + d / deviation for d in (-20, -5, 5, 20)]
    breaks = sorted({*ends, *(z for z in near if ends[0] < z < ends[1])})
    parts = [
        quad(integrand, a, b, epsabs=0, epsrel=1e-12, limit=200)[0]
        for a, b in itertools.pairwise(breaks)
    ]
    return math.fsum(parts)


def random_gaussians(n, classes, seed=0, scale=1.0):
    """Logits and their covariances, of a common shift's size and more."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    root = torch.randn(n, classes, classes, dtype=torch.float64, generator=generator)
    return mean, scale * root @ root.mT / classes


def contrasts(mean, covariance):
    rows = torch.eye(mean.shape[-1], dtype=mean.dtype)[1:]
    rows = rows - torch.eye(mean.shape[-1], dtype=mean.dtype)[0]
    return mean @ rows.T, rows @ covariance @ rows.T


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_two_classes_agree_with_adaptive_quadrature(deviation):
    mean = double(*MEANS)
    found = binary_log_probabilities(mean, mean.new_full((len(MEANS),), deviation**2)).exp()
    expected = [[adaptive(-m, deviation), adaptive(m, deviation)] for m in MEANS]
    # Relative errors too: a small probability is a large loss.
    torch.testing.assert_close(found, double(*expected), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(MEANS)).double(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("variance", [0.0, 1e-3, 1.0, 10.0])
def test_no_probability_exceeds_one(variance):
    mean = torch.linspace(-60, 60, 4001, dtype=torch.float64, requires_grad=True)
    log_p = binary_log_probabilities(mean, torch.full((4001,), variance).double())
    assert log_p.max() <= 0
    (gradient,) = torch.autograd.grad(log_p.sum(), mean)
    expected = -mean.detach().sign()  # of the improbable class, where the other is certain
    certain = mean.detach().abs() > 25 + variance
    torch.testing.assert_close(gradient[certain], expected[certain], rtol=0, atol=1e-6)


def test_single_precision_costs_what_single_precision_must():
    mean, variance = double(*MEANS), double(*MEANS).square()
    exact = binary_log_probabilities(mean, variance)
    found = binary_log_probabilities(mean.float(), variance.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [3, 6, 20])
@pytest.mark.parametrize("widest", [1.0, 3.0, 7.0])
def test_more_classes_agree_with_a_million_samples(classes, widest):
    mean, covariance = contrasts(*random_gaussians(1, classes, seed=classes))
    covariance = covariance * widest**2 / covariance.diagonal(dim1=1, dim2=2).max()
    found = softmax_log_probabilities(mean, covariance).exp()
    generator, root = torch.Generator().manual_seed(0), torch.linalg.cholesky(covariance[0])
    total = torch.zeros(classes, dtype=torch.float64)
    for _ in range(25):  # 20,000 points each, and their mirror images
        draws = torch.randn(20_000, classes - 1, generator=generator).double() @ root.T
        for signed in (draws, -draws):
            total += F.pad(mean + signed, (1, 0)).softmax(-1).sum(0)
    torch.testing.assert_close(found[0], total / 1e6, atol=2e-3, rtol=0)
    torch.testing.assert_close(found.sum().item(), 1.0, atol=1e-12, rtol=0)


def test_points_of_one_variable_give_what_the_trapezoidal_rule_gives():
    """A third class that is out of reach leaves two, by the other of the two methods."""
    mean, variance = double(-3.0, 0.0, 2.0, 9.0), double(0.5, 4.0, 40.0, 90.0)
    covariance = torch.zeros(4, 2, 2, dtype=torch.float64)
    covariance[:, 0, 0] = variance
    out_of_reach = torch.stack([mean, torch.full_like(mean, -1e4)], -1)
    found = softmax_log_probabilities(out_of_reach, covariance).exp()
    expected = binary_log_probabilities(mean, variance).exp()
    torch.testing.assert_close(found[:, :2], expected, atol=5e-4, rtol=0)
    assert not found[:, 2].any()


def test_gradients_are_those_of_finite_differences():
    mean = double(-20.0, -1.0, 0.5, 3.0).requires_grad_()
    variance = double(30.0, 1e-3, 2.0, 400.0).requires_grad_()
    # As far as neighbouring integrals have errors of their own: 1e-9 over steps of 1e-3.
    assert torch.autograd.gradcheck(
        binary_log_probabilities, (mean, variance), eps=1e-4, atol=1e-5, rtol=1e-4
    )
    mean, covariance = contrasts(*random_gaussians(2, 4))
    root = covariance_root(covariance).requires_grad_()

    def of_root(mean, root):
        return softmax_log_probabilities(mean, root @ root.mT, points=64)

    assert torch.autograd.gradcheck(of_root, (mean.requires_grad_(), root))


def test_the_gradient_is_that_of_the_integral():
    """Along the mean of two classes it is the mean of ``σ(1 − σ)``."""
    for mean, deviation in ((-8.0, 3.0), (1.0, 0.2), (30.0, 40.0)):
        at = double(mean).requires_grad_()
        p = binary_log_probabilities(at, double(deviation**2)).exp()[0, 1]
        (slope,) = torch.autograd.grad(p, at)
        step = 0.01 * (1 + deviation)
        rise = adaptive(mean + step, deviation) - adaptive(mean - step, deviation)
        assert slope.item() == pytest.approx(rise / (2 * step), rel=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_neither_the_rest_of_the_batch_nor_its_parts_matter(classes):
    mean, covariance = random_gaussians(9, classes)
    covariance = covariance * torch.logspace(-3, 2, 9)[:, None, None]  # all numbers of points
    link = Link("quadrature")
    whole = link.log_probabilities(mean, covariance)
    for size in (1, 2, 4):
        parts = zip(mean.split(size), covariance.split(size), strict=True)
        found = torch.cat([link.log_probabilities(m, S) for m, S in parts])
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    order = torch.arange(9).flip(0)
    found = link.log_probabilities(mean[order], covariance[order])
    torch.testing.assert_close(found, whole[order], rtol=1e-12, atol=1e-12)
    # A grid of covariances for one batch, as a tuning has it.
    grid = link.log_probabilities(mean, torch.stack([covariance, 3 * covariance]))
    torch.testing.assert_close(grid[0], whole, rtol=1e-12, atol=1e-12)


def test_an_example_with_a_bad_covariance_does_not_widen_the_others():
    covariance = torch.stack([torch.eye(3), torch.ones(3, 3) - 1e-5 * torch.eye(3)]).double()
    roots = covariance_root(covariance)
    torch.testing.assert_close(roots[0], torch.eye(3).double(), rtol=0, atol=1e-11)
    torch.testing.assert_close(roots[1] @ roots[1].T, covariance[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_what_all_logits_share_changes_nothing(classes):
    mean, covariance = random_gaussians(5, classes)
    link = Link("quadrature")
    expected = link.log_probabilities(mean, covariance)
    shifted = link.log_probabilities(mean - 17, covariance + 4.0)
    torch.testing.assert_close(shifted, expected, rtol=1e-10, atol=1e-10)
    # Nor does a shift that is correlated with the logits.
    lean = torch.linspace(0, 1, classes, dtype=torch.float64)
    leaning = covariance + 4 * (lean[:, None] + lean)
    torch.testing.assert_close(link.log_probabilities(mean, leaning), expected)
    own, wider = (Link("probit").log_probabilities(mean, covariance + v) for v in (0.0, 4.0))
    assert (own - wider).abs().max() > 0.1


def test_one_logit_is_the_two_class_case():
    mean, variance = double(-2.0, 0.3)[:, None], double(3.0, 0.1)[:, None, None]
    expected = binary_log_probabilities(mean[:, 0], variance[:, 0, 0])
    for relative in (False, True):
        found = Link("quadrature").log_probabilities(mean, variance, relative)
        assert torch.equal(found, expected)
    two = F.pad(mean, (1, 0)), F.pad(variance, (1, 0, 1, 0))
    torch.testing.assert_close(Link("quadrature").log_probabilities(*two), expected)


def test_singular_covariances_are_points_or_lines():
    mean, _ = random_gaussians(4, 3)
    link = Link("quadrature")
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    torch.testing.assert_close(
        link.log_probabilities(mean, nothing), mean.log_softmax(-1), rtol=0, atol=1e-5
    )
    shared = torch.full((3, 3), 9.0, dtype=torch.float64)
    torch.testing.assert_close(
        link.log_probabilities(mean, shared), mean.log_softmax(-1), rtol=0, atol=1e-5
    )
    direction = double(0.0, 1.0, 1.0)  # the last two classes against the first
    found = link.log_probabilities(double(0.0, 0.5, 0.5), 4 * direction[:, None] * direction)
    first = binary_log_probabilities(double(0.5 + math.log(2)), double(4.0))[0, 0]
    torch.testing.assert_close(found[0], first, rtol=0, atol=1e-3)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=1e-5)
    for classes in (2, 3):
        for bad in (math.nan, math.inf, -1.0):
            covariance = torch.full((classes, classes), 0.0).double().fill_diagonal_(bad)
            with pytest.raises(FloatingPointError, match="far from positive"):
                link.log_probabilities(torch.zeros(classes).double(), covariance)


def test_nothing_is_random():
    mean, covariance = random_gaussians(6, 5, scale=9.0)
    state = torch.random.get_rng_state()
    first = Link("quadrature").log_probabilities(mean, covariance)
    points = normal_points(256, 3)
    torch.manual_seed(7)
    assert torch.equal(Link("quadrature").log_probabilities(mean, covariance), first)
    assert torch.equal(normal_points(256, 3), points)
    torch.random.set_rng_state(state)
    Link("quadrature").log_probabilities(mean, covariance)
    normal_points(128, 11)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_points_are_those_of_a_standard_normal():
    points = normal_points(4096, 5)
    assert points.shape == (4096, 5) and points.dtype == torch.float64
    torch.testing.assert_close(points.mean(0), torch.zeros(5).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(points.T.cov(), torch.eye(5).double(), atol=1e-2, rtol=0)
    points.zero_()  # a caller's copy
    assert normal_points(4096, 5).any()


def test_a_number_of_points_may_be_asked_for():
    mean, covariance = random_gaussians(3, 4, scale=20.0)
    many, few, fewer = (
        Link("quadrature", points=n).log_probabilities(mean, covariance).exp()
        for n in (None, 512, 16)
    )
    assert (few - many).abs().max() < 5e-3 < (fewer - many).abs().max()
