"""Saved posteriors are rounded unless exactness is asked for: what that saves, keeps and costs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from laplace_lora import (
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
    start_of,
)
from laplace_lora.linalg.eigen import Eigen
from laplace_lora.linalg.factors import DenseFactor
from laplace_lora.linalg.rounded import FLOAT16, orthonormal, rounded, widened
from laplace_lora.linalg.sketch import LowRankFactor
from laplace_lora.storage.files import CONFIG, TENSORS
from support.batches import loader, token_batch
from support.corrected_posteriors import fit_corrected
from support.exact_posteriors import BOTH, exact_posterior
from support.forgery import forge, forge_tensors
from support.models import peft_model
from support.posteriors import EVERY_CLASS, LOW, fitted
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)
ERROR = 2e-3  # of the predictive covariance, relative; float16 has an error of 5e-4


def covariance(la):
    return la._glm_predictive_distribution(BATCH)[1]


def close(found, expected, bound=ERROR):
    assert float((found - expected).norm()) <= bound * float(expected.norm())


def sketched():
    """More weights than a sketch has columns."""
    la = LowRankLoraLaplace(peft_model("bert"), "classification", rank=4)
    la.fit(loader())
    return la


POSTERIORS = {
    **{
        f"{cls.__name__}-{len(kw)}": (lambda c=cls, k=kw: fitted(c, **k)) for cls, kw in EVERY_CLASS
    },
    "corrected": lambda: fit_corrected(**LOW),
    **{cls.__name__: (lambda c=cls, k=kw: exact_posterior(c, **k)) for cls, kw in BOTH},
    "sketched": sketched,
}


@pytest.mark.parametrize("kind", POSTERIORS)
def test_the_default_is_within_its_error(kind, tmp_path):
    la = POSTERIORS[kind]()
    la.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["precision"] == "half"
    again = type(la).from_pretrained(la.logits_model, tmp_path)
    close(covariance(again), covariance(la))
    assert float((again(BATCH) - la(BATCH)).abs().max()) <= ERROR
    close(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert torch.equal(again.prior_precision, la.prior_precision)
    assert again.arguments() == la.arguments()
    la.fit(loader(2, seed=5), override=False)
    again.fit(loader(2, seed=5), override=False)
    assert again.n_data == la.n_data
    close(covariance(again), covariance(la), 0.1 if kind == "sketched" else 5 * ERROR)


@pytest.mark.parametrize("kwargs", [{"factor_rank": None}, LOW])
def test_kronecker_factors_keep_their_eigenvalues_and_traces(kwargs, tmp_path):
    la = fitted(**kwargs)
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    pairs = (each.state.curvature.factors.factors() for each in (again, la))
    for found, expected in zip(*pairs, strict=True):
        assert type(found) is type(expected)
        assert_near(found.trace, expected.trace, 1e-12)
    for found, expected in zip(again.H.blocks, la.H.blocks, strict=True):
        for side, other in zip(found, expected, strict=True):
            assert torch.equal(side.values, other.values)
            assert torch.equal(side.residual, other.residual)
            eye = torch.eye(side.vectors.shape[1], dtype=side.vectors.dtype)
            assert_near(side.vectors.T @ side.vectors, eye, 1e-10)
    for prior in (1e-3, 1.0, 1e3):
        la.prior_precision = again.prior_precision = prior
        assert torch.equal(again.log_det_ratio, la.log_det_ratio)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_exact_on_request(kind, tmp_path):
    la = POSTERIORS[kind]()
    la.save_pretrained(tmp_path, precision="exact")
    again = type(la).from_pretrained(la.logits_model, tmp_path)
    packed, found = (each.structure.pack(each.state.curvature)[0] for each in (la, again))
    assert packed.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in packed.items())
    assert torch.equal(again.state.loss_gradient, la.state.loss_gradient)
    assert FLOAT16 not in {tensor.dtype for tensor in load_file(tmp_path / TENSORS).values()}


def sizes(la, tmp_path):
    found = []
    for precision in ("half", "exact"):
        la.save_pretrained(tmp_path, precision=precision)
        tensors = load_file(tmp_path / TENSORS)
        found.append(sum(t.nbytes for name, t in tensors.items() if name.startswith("curvature.")))
    return found


def test_what_it_saves(tmp_path):
    """In float32: a sketch of 2k + 10 columns and k vectors come down to k half ones."""
    model = peft_model("bert", dtype=torch.float32, modules_to_save=None)
    half, exact = sizes(fitted(model=model, factor_rank=2, low_rank_threshold=4), tmp_path)
    assert half < exact / 3.5
    la = FullLoraLLLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    half, exact = sizes(la, tmp_path)
    assert half < 0.55 * exact
    la = FullLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    half, exact = sizes(la, tmp_path)  # the rows are of float64
    assert half < 0.26 * exact


def test_shift_and_prior_mean_come_back(tmp_path):
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification", prior_mean=start_of(model))
    la.fit(loader())
    la.optimize_prior_precision(method="marglik", correction=True)
    la.recentre(3.0)
    la.save_pretrained(tmp_path)
    assert "subspace.prior_mean" not in load_file(tmp_path / TENSORS)
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    close(again.state.settings.shift, la.state.settings.shift, 1e-7)
    assert torch.equal(again.state.settings.prior_mean, la.state.settings.prior_mean)
    assert again.state.has_subspace
    evidence = la.log_marginal_likelihood(correction=True)
    assert torch.equal(again.log_marginal_likelihood(correction=True), evidence)
    la.reset_mean()
    la.save_pretrained(tmp_path)
    assert KronLoraLaplace.from_pretrained(la.logits_model, tmp_path).state.settings.shift is None


def test_a_recentred_mean_moves_no_prediction(tmp_path):
    la = KronLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    la.recentre(0.1)
    assert float((la.mean - la.state.settings.shift).norm()) > 0
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    found, expected = again.predict(BATCH), la.predict(BATCH)
    assert_near(found.mean, expected.mean, 1e-6)
    assert_near(found.probs, expected.probs, 1e-6)

    def round_shift(tensors):  # as earlier versions wrote it
        tensors |= rounded("shift", tensors["shift"].double())

    forge_tensors(tmp_path, round_shift)
    names = json.loads((tmp_path / CONFIG).read_text())["further_tensors"]
    forge(tmp_path, further_tensors=sorted([*names, "shift.scale"]))
    earlier = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path).predict(BATCH)
    assert float((earlier.mean - expected.mean).abs().max()) > 1e-6
    close(earlier.mean, expected.mean)


def test_saving_what_was_loaded_changes_little(tmp_path):
    la = fitted(**LOW)
    for _ in range(3):
        la.save_pretrained(tmp_path)
        again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
        close(covariance(again), covariance(la))
        la = again


def test_another_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of \\('half', 'exact'\\), got 'int8'"):
        fitted().save_pretrained(tmp_path, precision="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["directions", "scale", "trace", "sums", "dtype"])
def test_forged_roundings_are_refused(kind, tmp_path):
    la = fitted(**LOW)
    la.save_pretrained(tmp_path)

    def change(tensors):
        name = next(name for name in tensors if name.endswith(".vectors"))
        traced = next(name for name in tensors if name.endswith(".trace"))
        if kind == "directions":
            tensors[name] *= 2
        elif kind == "scale":
            tensors["loss_gradient.scale"] *= -1
        elif kind == "trace":  # a dense factor has none
            tensors[name.replace("vectors", "trace")] = torch.zeros(2).double()
        elif kind == "sums":
            del tensors[traced]
        else:
            tensors["loss_gradient"] = tensors["loss_gradient"].double()

    forge_tensors(tmp_path, change)
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: -t, lambda t: t.reshape(1, -1)])
def test_a_forged_triangle_is_refused(change, tmp_path):
    la = FullLoraLLLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    la.save_pretrained(tmp_path)
    name = "curvature.triangle"
    forge_tensors(tmp_path, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(ValueError, match="does not fit"):
        FullLoraLLLaplace.from_pretrained(la.logits_model, tmp_path)


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_rounding_keeps_three_digits_at_any_magnitude(factor):
    torch.manual_seed(0)
    exact = factor * torch.randn(1000) * torch.logspace(-4, 0, 1000)
    found = widened(rounded("x", exact), "x", torch.float32)
    assert float(((found - exact) / exact).abs().max()) < 2**-11
    zeros = rounded("x", torch.zeros(3))
    assert torch.equal(widened(zeros, "x", torch.float32), torch.zeros(3))
    half = torch.randn(3).bfloat16()
    assert rounded("x", half)["x"] is half and widened({"x": half}, "x", torch.float32) is half


def test_directions_are_orthonormal_again():
    exact = torch.linalg.qr(torch.randn(300, 40, dtype=torch.float64))[0]
    found = orthonormal(exact.to(FLOAT16), torch.float64)
    assert_near(found.T @ found, torch.eye(40, dtype=torch.float64), 1e-12)
    close(found, exact, 5e-4)


def test_sums_are_rebuilt_from_all_eigenpairs():
    """A matrix of low rank with an even rest is its sketch's own; any is its eigenpairs'."""
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64))[0]
    values = torch.linspace(3, 1, 5).double()
    matrix = vectors * (values - 0.2) @ vectors.T + 0.2 * torch.eye(40, dtype=torch.float64)
    zeros = LowRankFactor.zeros(40, 5, torch.float64, "cpu")
    eigen = Eigen(vectors, values, torch.tensor(0.2).double())
    assert_near(LowRankFactor.of(eigen, matrix.trace()).sketch, zeros.add(matrix).sketch)
    assert_near(DenseFactor.of(DenseFactor(matrix).decompose()).matrix, matrix)
