"""Eigenvalue-corrected K-FAC against dense matrices from per-example Jacobians."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import forge_tensors
from test_convolutions import images, resnet
from test_interrupted_fit import Interruption
from test_posterior import DENSE, LENGTHS, LOW, loader
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, KronLoraLLLaplace, LogitsModel, LoraEF
from laplace_lora.likelihoods import roots as likelihoods
from laplace_lora.storage.files import TENSORS
from laplace_lora.structures.eigenvalue_correction import CorrectedKron
from tiny import TARGETS, adalora_model, assert_near, explicit_jacobians, peft_model, token_batch

ZERO = {**LOW, "residual": "zero"}
REDUCE = {"backend_kwargs": {"kfac_approx": "reduce"}}
OPTIONS = [DENSE, LOW, ZERO, {**LOW, **REDUCE}]
BATCH = token_batch((4, 2), seed=3)


def posterior(model="bert", likelihood="classification", correct=True, cls=KronLoraLaplace, **kw):
    targets = TARGETS if model == "llama-lm" else None
    model = peft_model(model) if isinstance(model, str) else model
    return cls(model, likelihood, target_ids=targets, eigenvalue_correction=correct, **kw)


def fitted(*args, data=None, **kwargs):
    la = posterior(*args, **kwargs)
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


def assert_is_diagonal_part(la, exact):
    residual = la.backend.residual
    for sides, ours, block in zip(la.H.blocks, blocks_of(la.H), exact, strict=True):
        assert_near(ours, diagonal_part(sides, block, residual))


@pytest.mark.parametrize("kwargs", OPTIONS)
@pytest.mark.parametrize("name", ["bert", "llama-lm", "gpt2", "adalora"])
def test_eigenvalues_are_those_of_explicit_jacobians(name, kwargs):
    model = adalora_model("bert") if name == "adalora" else name
    la = fitted(model, **kwargs)
    assert_is_diagonal_part(la, exact_blocks(la, token_batch(LENGTHS)))


def test_convolutions_count_their_patches():
    batch = images()
    examples = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    la = fitted(LogitsModel(resnet()), data=DataLoader(examples, batch_size=3), **LOW)
    assert_is_diagonal_part(la, exact_blocks(la, batch))


def test_regression_and_the_empirical_fisher():
    data = loader(likelihood="regression")
    la = fitted("bert", "regression", data=data, **LOW)
    eye = torch.eye(3, dtype=torch.float64).expand(len(LENGTHS), 3, 3)
    assert_is_diagonal_part(la, exact_blocks(la, token_batch(LENGTHS), eye))
    la = fitted(backend=LoraEF, **LOW)
    batch = token_batch(LENGTHS)
    f = la.model.eval()(batch)
    gradient = likelihoods.empirical_root(f, batch["labels"], "classification")[0]
    outer = gradient.unsqueeze(2) * gradient.unsqueeze(1)
    assert_is_diagonal_part(la, exact_blocks(la, batch, outer))


def test_a_sampled_fisher_is_corrected_by_columns_of_its_own(monkeypatch):
    options = {"backend_kwargs": {"stochastic": True}, **DENSE}
    la = fitted(**options)
    before = la.H.table(0).sum()
    la.fit(loader())
    assert (la.H.table(0).sum() - before).abs() > 1e-3 * before
    calls = []

    def exact(f, likelihood, num_samples):
        calls.append(num_samples)
        return likelihoods.hessian_root(f, likelihood)

    monkeypatch.setattr(likelihoods, "sampled_root", exact)
    assert_near(fitted(**options)(BATCH), fitted(**DENSE)(BATCH))
    assert len(calls) == 2 * len(loader())


@pytest.mark.parametrize("kwargs", OPTIONS)
@pytest.mark.parametrize("name", ["bert", "llama-lm"])
def test_no_farther_from_the_exact_blocks_than_the_factors(name, kwargs):
    """The diagonal in a basis is the nearest of all matrices diagonal in it."""
    corrected, plain = fitted(name, **kwargs), fitted(name, correct=False, **kwargs)
    closer = []
    for exact, ours, theirs in zip(
        exact_blocks(corrected, token_batch(LENGTHS)),
        blocks_of(corrected.H),
        blocks_of(plain.H),
        strict=True,
    ):
        error, bound = (ours - exact).norm(), (theirs - exact).norm()
        assert error <= bound * (1 + 1e-6) + 1e-12
        closer.append(bool(error < 0.99 * bound))
    assert sum(closer) >= len(closer) // 2


def linear_net():
    torch.manual_seed(0)
    return LogitsModel(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4, bias=False)).double())


def vectors(n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    y = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return [(x[i], y[i]) for i in range(n)]


@pytest.mark.parametrize("case", ["one token", "deep linear"])
def test_exact_where_the_factors_are(case):
    if case == "one token":
        la = fitted("llama-lm", data=loader(lengths=(1,)), **DENSE)
        exact = exact_blocks(la, token_batch((1,)))
    else:
        la = fitted(linear_net(), "regression", data=DataLoader(vectors(), batch_size=4), **DENSE)
        x = torch.stack([x for x, _ in vectors()])
        exact = exact_blocks(la, x, torch.eye(4).double().expand(len(x), 4, 4))
    for ours, block in zip(blocks_of(la.H), exact, strict=True):
        assert_near(ours, block)
    for i, table in enumerate(la.H.tables):
        assert_near(table, la.H_facs.decompose().table(i))


@pytest.mark.parametrize("kwargs", OPTIONS)
def test_the_trace_is_that_of_the_exact_block(kwargs):
    la = fitted(**kwargs)
    exact = torch.stack([block.trace() for block in exact_blocks(la, token_batch(LENGTHS))])
    found = torch.stack([sum(n * e.sum() for e, n in s) for s in la.block_spectra()])
    if kwargs is ZERO:
        assert (found <= exact * (1 + 1e-9)).all() and (found < 0.99 * exact).any()
    else:
        assert_near(found, exact)


def test_a_factor_rank_that_suffices_equals_dense():
    data = loader(1, lengths=(2,))
    dense = fitted("llama-lm", data=data, **DENSE)
    low = fitted("llama-lm", data=data, factor_rank=6, low_rank_threshold=20)
    assert any(side.multiplicity for sides in low.H.blocks for side in sides)
    assert_near(low.log_marginal_likelihood(), dense.log_marginal_likelihood())
    assert_near(low(BATCH), dense(BATCH))


@pytest.mark.parametrize("kwargs", [DENSE, LOW])
def test_batches_and_padding_do_not_matter(kwargs):
    reference = fitted("llama-lm", **kwargs)
    for data in (loader(1), loader(7), loader(2, pad_to=11, side="left"), loader(5, pad_to=9)):
        la = fitted("llama-lm", data=data, **kwargs)
        assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
        assert_near(la(BATCH), reference(BATCH))


@pytest.mark.parametrize("kwargs", [DENSE, LOW, ZERO])
def test_everything_follows_from_the_matrix(kwargs):
    la = fitted(r_one := peft_model("bert", r=1), prior_precision=0.7, temperature=0.8, **kwargs)
    assert la.logits_model.model is r_one
    matrix = la.posterior_precision.to_matrix()
    prior = 0.7 * torch.eye(la.n_params, dtype=torch.float64)
    assert_near(matrix, la._H_factor * la.H.to_matrix() + prior)
    covariance = matrix.inverse()
    assert_near(la.posterior_precision.to_matrix(-1), covariance)
    assert_near(la.weight_variance(), covariance.diagonal())
    assert_near(la.log_det_ratio, matrix.logdet() - prior.logdet())
    expected = -la.loss / 0.8 - 0.5 * (la.scatter + matrix.logdet() - prior.logdet())
    assert_near(la.log_marginal_likelihood(), expected)
    J = torch.cat([rows.flatten(2) for rows in explicit_jacobians(la.model, BATCH)], -1)
    moments = J @ covariance @ J.mT
    assert_near(la._glm_predictive_distribution(BATCH)[1], moments)
    _, grams = la.gram_blocks(BATCH)
    assert_near(sum((M / (e + 0.7)).sum(-1) for _, pairs in grams for e, M in pairs), moments)
    noise = torch.randn(5, la.n_params, dtype=torch.float64)
    root = la.posterior_precision.bmm(noise, exponent=-0.5)
    assert_near(root @ matrix @ root.T, noise @ noise.T)
    samples = la.sample(4000, generator=torch.Generator().manual_seed(0))
    assert_near(samples.var(0), covariance.diagonal(), 0.1)


@pytest.mark.parametrize("structure", ["scalar", "matrix", "layerwise"])
def test_the_marginal_likelihood_is_maximal_where_tuning_ends(structure):
    la = fitted(**LOW)
    la.optimize_prior_precision(prior_structure=structure)
    best, prior = la.log_marginal_likelihood(), la.prior_precision
    for factor in (0.8, 1.25):
        assert la.log_marginal_likelihood(prior * factor) < best


def test_tuning_on_validation_data_sees_corrected_covariances():
    la = fitted("llama-lm", **LOW)
    grid = {"grid_size": 5, "log_prior_prec_min": -3, "log_prior_prec_max": 1}
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(seed=5), **grid)
    best, losses = la.prior_precision.item(), {}
    for delta in torch.logspace(-3, 1, 5).tolist():
        la.prior_precision = delta
        losses[delta] = sum(
            -la(batch).log()[range(len(batch["labels"])), batch["labels"]].sum()
            for batch in loader(seed=5)
        )
    assert best == pytest.approx(min(losses, key=losses.get))
    la.optimize_prior_precision(method="val_gd", val_loader=loader(seed=5), n_steps=3)


@pytest.mark.parametrize("kwargs", OPTIONS)
def test_the_option_changes_the_posterior_and_nothing_else(kwargs):
    corrected, plain = (
        fitted("llama-lm", correct=c, prior_precision=1e-3, **kwargs) for c in (True, False)
    )
    assert_near(corrected.H.eigenvectors[0], plain.H.eigenvectors[0], 1e-12)
    assert corrected.loss == plain.loss and corrected.n_data == plain.n_data
    one, other = (la._glm_predictive_distribution(BATCH)[1] for la in (corrected, plain))
    assert (one - other).norm() > 1e-2 * other.norm()
    assert corrected.arguments() == {**plain.arguments(), "eigenvalue_correction": True}
    held = sum(table.numel() for table in corrected.H.tables)
    assert corrected.curvature_size() - plain.curvature_size() == held
    estimate, cheaper = corrected.estimate_memory(BATCH), plain.estimate_memory(BATCH)
    assert estimate.fit == cheaper.fit + 8 * held + estimate.jacobian
    assert estimate.predict == cheaper.predict + 8 * held


# ---------------------------------------------------------------- more data


@pytest.mark.parametrize("kwargs", [DENSE, LOW, ZERO])
def test_merging_equals_a_joint_fit_where_bases_agree(kwargs):
    """The same data twice have the eigenbasis of the data once."""
    model, examples = peft_model("bert"), loader().dataset
    one, two, joint = (posterior(model, **kwargs) for _ in range(3))
    one.fit(loader())
    two.fit(DataLoader(list(reversed(examples)), batch_size=2))
    joint.fit(DataLoader([*examples, *examples], batch_size=5))
    one.merge([two])
    assert one.n_data == joint.n_data
    assert_near(one.H.to_matrix(), joint.H.to_matrix())
    assert_near(one.log_marginal_likelihood(), joint.log_marginal_likelihood())
    assert_near(one(BATCH), joint(BATCH))


@pytest.mark.parametrize("kwargs", OPTIONS)
@pytest.mark.parametrize("way", ["merge", "fit"])
def test_earlier_data_count_by_their_diagonal_in_the_joint_basis(way, kwargs):
    model, examples = peft_model("bert"), loader().dataset
    first, second, plain = (posterior(model, correct=c, **kwargs) for c in (True, True, False))
    first.fit(DataLoader(examples[:3], batch_size=2))
    old = blocks_of(first.H)
    rest = DataLoader(examples[3:], batch_size=2)
    if way == "fit":
        first.fit(rest, override=False)
        batch = token_batch(LENGTHS)
        new = exact_blocks(first, {key: value[3:] for key, value in batch.items()})
    else:
        second.fit(rest)
        new = blocks_of(second.H)
        first.merge([second])
    plain.fit(loader())
    residual = kwargs.get("residual", "isotropic")
    for sides, ours, a, b, basis in zip(
        first.H.blocks, blocks_of(first.H), old, new, plain.H.blocks, strict=True
    ):
        assert_near(ours, diagonal_part(sides, a + b, residual))
        assert_near([side.values for side in sides], [side.values for side in basis])
        if residual == "isotropic":
            assert_near(ours.trace(), (a + b).trace())
    assert first.n_data == len(LENGTHS)


# ---------------------------------------------------------------- failures


class Varying:
    """A loader that yields other numbers of batches in each pass, or stops in its middle."""

    def __init__(self, data, *passes, error=None):
        self.data, self.dataset = data, data.dataset
        self.passes, self.error = iter(passes), error

    def __iter__(self):
        count = next(self.passes)
        for index, batch in enumerate(self.data):
            if index < count:
                yield batch
        if self.error is not None and count < len(self.data):
            raise self.error


@pytest.mark.parametrize("kwargs", [DENSE, LOW])
def test_a_failure_in_the_second_pass_leaves_the_earlier_posterior(kwargs, monkeypatch):
    la = fitted(**kwargs)
    before, evidence = la(BATCH), la.log_marginal_likelihood()
    more = loader(2, seed=5)
    for error, passes, message in (
        (ValueError, (4, 3), r"7 examples in the first pass and 6 in the second"),
        (ValueError, (4, 0), "the training loader is empty"),
    ):
        for override in (True, False):
            with pytest.raises(error, match=message):
                la.fit(Varying(more, *passes), override=override)
    original = type(la.H).gram_diagonal

    def broken(self, i, W):
        diagonal = original(self, i, W)
        return diagonal / 0 if i == 2 else diagonal

    monkeypatch.setattr(type(la.H), "gram_diagonal", broken)
    name = la.block_names[2].replace(".", r"\.")
    with pytest.raises(FloatingPointError, match=rf"batch 0 .*eigenvalues of '{name}' are not"):
        la.fit(more)
    assert torch.equal(la(BATCH), before)
    assert torch.equal(la.log_marginal_likelihood(), evidence)
    assert la.n_data == len(LENGTHS)


def test_a_curvature_of_the_other_kind_is_refused():
    corrected, plain = fitted(**DENSE), fitted(correct=False, **DENSE)
    assert isinstance(corrected.curvature, CorrectedKron)
    for la, other in ((corrected, plain), (plain, corrected)):
        before = la(BATCH)
        with pytest.raises(ValueError, match="must be a CorrectedKron if, and only if"):
            la.adopt(other.curvature, 7, loader())
        with pytest.raises(ValueError, match="another eigenvalue_correction"):
            la.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="with the same arguments merge"):
            la.merge([other])
        assert torch.equal(la(BATCH), before)
    twin = posterior(**DENSE)
    twin.adopt(corrected.curvature.to("cpu"), 7, loader())
    assert_near(twin(BATCH), corrected(BATCH))


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("stop", [(2, 4), (4, 1), (4, 3), (4, 4)])
def test_a_fit_resumes_in_either_pass(stop, stochastic, tmp_path):
    kwargs = {**LOW, "backend_kwargs": {"stochastic": stochastic}}
    data, folder = loader(2), tmp_path / "fit"
    second_pass = stop[0] == len(data)
    options = {"checkpoint_dir": folder, "checkpoint_every": 3 if stop == (4, 3) else 1}
    first = posterior(**kwargs)
    if stop == (4, 4):  # after the last batch, before the posterior was made
        first._install = lambda curvature: (_ for _ in ()).throw(Interruption)
    with pytest.raises(Interruption):
        first.fit(Varying(data, *stop, error=Interruption()), **options)
    names = ["laplace_eigenvalues_0_of_1.safetensors", "laplace_fit_0_of_1.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names[not second_pass :]
    sums = load_file(folder / names[1])
    resumed, added = posterior(**kwargs), []
    original = resumed.backend.eigenbasis_diagonal
    resumed.backend.eigenbasis_diagonal = lambda x, y, basis: (
        added.append(len(y)) or original(x, y, basis)
    )
    resumed.fit(data, **options)
    assert not list(folder.iterdir())
    # The first batch again, for the shape of the sums.
    assert len(added) == (1 + len(data) - stop[1] if second_pass else len(data))
    if second_pass:  # labels of a sampled Fisher are not drawn again for the same factors
        factor = resumed.H_facs.kfacs[0][0].tensors()[0]
        assert any(torch.equal(factor, tensor) for tensor in sums.values())
    if not stochastic:
        straight = fitted(data=data, **kwargs)
        assert torch.equal(resumed(BATCH), straight(BATCH))
        assert resumed.loss == straight.loss


def test_sums_of_another_basis_are_refused(tmp_path):
    """With and without the earlier data the same batches have other eigenvectors."""
    la = fitted(data=loader(seed=5), **LOW)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    data = loader(2)
    with pytest.raises(Interruption):
        la.fit(Varying(data, 4, 2, error=Interruption()), override=False, **options)
    with pytest.raises(ValueError, match="another model or with other arguments"):
        la.fit(data, **options)
    la.fit(data, override=False, **options)
    straight = fitted(data=loader(seed=5), **LOW)
    straight.fit(data, override=False)
    assert torch.equal(la(BATCH), straight(BATCH))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kwargs", OPTIONS)
def test_a_posterior_comes_back_bit_for_bit(kwargs, tmp_path):
    la = fitted(**kwargs)
    la.optimize_prior_precision()
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(la.logits_model.model, tmp_path)
    assert again.arguments() == la.arguments()
    restored = posterior(la.logits_model.model, **kwargs)
    restored.load_state_dict(la.state_dict())
    for other in (again, restored):
        assert torch.equal(other(BATCH), la(BATCH))
        assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
        other.fit(loader(2, seed=5), override=False)
        assert other.n_data == 2 * la.n_data
    assert_near(again.H.to_matrix(), restored.H.to_matrix())


def test_state_dicts_keep_the_residual():
    la = fitted(correct=False, **ZERO)
    other = posterior(correct=False, **ZERO)
    other.load_state_dict(la.state_dict())
    assert torch.equal(other(BATCH), la(BATCH))


@pytest.mark.parametrize("kind", ["negative", "shape", "missing", "extra", "nan", "flat"])
def test_forged_eigenvalues_are_refused(kind, tmp_path):
    la = fitted(**LOW)
    la.save_pretrained(tmp_path)

    def change(tensors):
        name = "curvature.eigenvalues.1"
        if kind == "negative":
            tensors[name].view(-1)[0] = -1.0
        elif kind == "shape":
            tensors[name] = tensors[name][:-1]
        elif kind == "missing":
            del tensors[name]
        elif kind == "nan":
            tensors[name].view(-1)[0] = torch.nan
        elif kind == "flat":
            tensors[name] = tensors[name].flatten()
        else:
            tensors["curvature.eigenvalues.99"] = torch.ones(2, 2)

    forge_tensors(tmp_path, change)
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


def test_tables_without_the_option_are_refused(tmp_path):
    fitted(correct=False, **LOW).save_pretrained(tmp_path)
    assert not any("eigenvalues" in name for name in load_file(tmp_path / TENSORS))
    config = json.loads((tmp_path / "laplace_config.json").read_text())
    assert config["arguments"]["eigenvalue_correction"] is False
    forge_tensors(tmp_path, lambda t: t.update({"curvature.eigenvalues.0": torch.ones(2, 2)}))
    with pytest.raises(ValueError, match="belongs to no block"):
        KronLoraLaplace.from_pretrained(peft_model("bert"), tmp_path)


def test_moving_to_a_device_moves_the_eigenvalues():
    la = fitted(**LOW)
    assert_near(la.to("cpu")(BATCH), la(BATCH))
    la.to("meta")
    assert {table.device.type for table in la.H.tables} == {"meta"}
    assert {table.device.type for table in la.curvature.to("meta").corrected.tables} == {"meta"}


def test_single_precision_eigenvalues_of_half_precision_models():
    la = fitted(peft_model("bert", dtype=torch.bfloat16), **LOW)
    assert {table.dtype for table in la.H.tables} == {torch.float32}
    assert la(BATCH).isfinite().all()


# ---------------------------------------------------------------- other ways in


@pytest.mark.parametrize("kwargs", [{}, {"factor_rank": 2, "low_rank_threshold": 4}])
def test_the_last_layer_may_be_corrected(kwargs, tmp_path):
    la = fitted(cls=KronLoraLLLaplace, **kwargs)
    last = la.model.model
    features, head = last.features(token_batch(LENGTHS)), last.head
    p = head(features).softmax(-1).detach()
    outer = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    weight = torch.einsum("ncd,na,nb->cadb", outer, features, features).reshape([3 * 16] * 2)
    for sides, ours, exact in zip(
        la.H.blocks, blocks_of(la.H), [weight, outer.sum(0)], strict=True
    ):
        assert_near(ours, diagonal_part(sides, exact))
    la.save_pretrained(tmp_path)
    again = KronLoraLLLaplace.from_pretrained(la.logits_model.model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    plain = fitted(cls=KronLoraLLLaplace, correct=False, **kwargs)
    assert not torch.allclose(plain(BATCH), la(BATCH), rtol=1e-6)


def test_both_passes_are_shown_on_request(capsys):
    posterior(**LOW).fit(loader(), progress_bar=True)
    shown = capsys.readouterr().err
    assert "Fitting the posterior" in shown and "Correcting the eigenvalues" in shown
