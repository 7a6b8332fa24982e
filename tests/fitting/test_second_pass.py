"""The second pass, for corrected eigenvalues: more data, failures, resuming."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from laplace_lora.fitting import second_pass as second_pass_module
from laplace_lora.structures.eigenvalue_correction import CorrectedKron
from support.batches import LENGTHS, loader, token_batch
from support.corrected_posteriors import (
    OPTIONS,
    ZERO,
    blocks_of,
    corrected_posterior,
    diagonal_part,
    exact_blocks,
    fit_corrected,
)
from support.interruptions import Interruption, Varying, interrupted
from support.models import peft_model
from support.posteriors import DENSE, LOW
from support.references import assert_near

BATCH = token_batch((4, 2), seed=3)


@pytest.mark.parametrize("kwargs", [DENSE, LOW, ZERO])
def test_merging_equals_a_joint_fit_where_bases_agree(kwargs):
    """The same data twice have the eigenbasis of the data once."""
    model, examples = peft_model("bert"), loader().dataset
    one, two, joint = (corrected_posterior(model, **kwargs) for _ in range(3))
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
    first, second, plain = (
        corrected_posterior(model, correct=c, **kwargs) for c in (True, True, False)
    )
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


@pytest.mark.parametrize("kwargs", [DENSE, LOW])
def test_a_failure_in_the_second_pass_leaves_the_earlier_posterior(kwargs, monkeypatch):
    la = fit_corrected(**kwargs)
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
    corrected, plain = fit_corrected(**DENSE), fit_corrected(correct=False, **DENSE)
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
    twin = corrected_posterior(**DENSE)
    twin.adopt(corrected.curvature.to("cpu"), 7, loader())
    assert_near(twin(BATCH), corrected(BATCH))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("stop", [(2, 4), (4, 1), (4, 3), (4, 4)])
def test_a_fit_resumes_in_either_pass(stop, stochastic, tmp_path, monkeypatch):
    kwargs = {**LOW, "backend_kwargs": {"stochastic": stochastic}}
    data, folder = loader(2), tmp_path / "fit"
    second_pass = stop[0] == len(data)
    options = {"checkpoint_dir": folder, "checkpoint_every": 3 if stop == (4, 3) else 1}
    first = corrected_posterior(**kwargs)
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        if stop == (4, 4):  # after the last batch, before the posterior was made
            patch.setattr(type(first.structure), "ready", interrupted)
        first.fit(Varying(data, *stop, error=Interruption()), **options)
    names = ["laplace_eigenvalues_0_of_1.safetensors", "laplace_fit_0_of_1.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names[not second_pass :]
    sums = load_file(folder / names[1])
    resumed, added = corrected_posterior(**kwargs), []
    original = second_pass_module.eigenbasis_diagonal

    def counted(engine, x, y, basis):
        added.append(len(y))
        return original(engine, x, y, basis)

    monkeypatch.setattr(second_pass_module, "eigenbasis_diagonal", counted)
    resumed.fit(data, **options)
    assert not list(folder.iterdir())
    # The first batch again, for the shape of the sums.
    assert len(added) == (1 + len(data) - stop[1] if second_pass else len(data))
    if second_pass:  # labels of a sampled Fisher are not drawn again for the same factors
        factor = resumed.H_facs.kfacs[0][0].tensors()[0]
        assert any(torch.equal(factor, tensor) for tensor in sums.values())
    if not stochastic:
        straight = fit_corrected(data=data, **kwargs)
        assert torch.equal(resumed(BATCH), straight(BATCH))
        assert resumed.loss == straight.loss


def test_sums_of_another_basis_are_refused(tmp_path):
    """With and without the earlier data the same batches have other eigenvectors."""
    la = fit_corrected(data=loader(seed=5), **LOW)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    data = loader(2)
    with pytest.raises(Interruption):
        la.fit(Varying(data, 4, 2, error=Interruption()), override=False, **options)
    with pytest.raises(ValueError, match="another model or with other arguments"):
        la.fit(data, **options)
    la.fit(data, override=False, **options)
    straight = fit_corrected(data=loader(seed=5), **LOW)
    straight.fit(data, override=False)
    assert torch.equal(la(BATCH), straight(BATCH))


def test_both_passes_are_shown_on_request(capsys):
    corrected_posterior(**LOW).fit(loader(), progress_bar=True)
    shown = capsys.readouterr().err
    assert "Fitting the posterior" in shown and "Correcting the eigenvalues" in shown
