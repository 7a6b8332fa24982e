"""Acquisition against exact joint quantities: enumerated labels, explicit Fisher information."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers.trainer_pt_utils import (
    DistributedLengthGroupedSampler,
    LengthGroupedSampler,
)

from laplace_lora import KronLoraLaplace, LoraGGN
from laplace_lora.acquisition import acquire as acquire_file
from laplace_lora.acquisition import batch_bald as batch_bald_file
from laplace_lora.acquisition.acquire import METHODS
from laplace_lora.acquisition.bait import bait, fisher_rows
from laplace_lora.acquisition.batch_bald import batch_bald
from laplace_lora.acquisition.joint_samples import JointSamples, joint_samples
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.predictive.glm import Predictor
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import posterior
from support.references import assert_near


def seeded():
    return torch.Generator().manual_seed(0)


def probabilities(samples=40, examples=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, examples, classes, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def entropy(p):
    return float(torch.special.entr(p).sum())


def joint_information(log_p, chosen):
    """Mutual information of the labels of some examples with the weights, all labels enumerated."""
    p = log_p.exp()
    total = 0.0
    for labels in itertools.product(range(p.shape[2]), repeat=len(chosen)):
        each = torch.stack([p[:, n, y] for n, y in zip(chosen, labels, strict=True)]).prod(0)
        total += entropy(each.mean().reshape(1))
    own = sum(torch.special.entr(p[:, n]).sum(-1).mean() for n in chosen)
    return total - float(own)


def test_gains_are_joint_information():
    log_p = probabilities()
    chosen, gains = batch_bald(log_p, 4)
    assert len(set(chosen.tolist())) == 4
    for k in range(1, 5):
        assert float(gains[:k].sum()) == pytest.approx(
            joint_information(log_p, chosen[:k].tolist())
        )
    first = max(range(6), key=lambda n: joint_information(log_p, [n]))
    assert chosen[0] == first
    second = max(set(range(6)) - {first}, key=lambda n: joint_information(log_p, [first, n]))
    assert chosen[1] == second


def test_drawn_configurations_estimate_the_same(monkeypatch):
    log_p = probabilities()
    monkeypatch.setattr(batch_bald_file, "CONFIGURATIONS", 20)
    chosen, gains = batch_bald(log_p, 4, seeded())
    exact = joint_information(log_p, chosen.tolist())
    assert float(gains.sum()) == pytest.approx(exact, rel=0.1)
    assert float(gains.sum()) != pytest.approx(exact, rel=1e-9)


def test_a_copy_of_an_example_is_not_chosen_twice():
    log_p = probabilities(examples=3)
    doubled = torch.cat([log_p, log_p], 1)
    chosen, _ = batch_bald(doubled, 3)
    assert sorted(n % 3 for n in chosen.tolist()) == [0, 1, 2]


def test_more_samples_have_the_same_covariance():
    samples = random_samples()
    found = samples.more(40000, seeded())
    assert found.deviations.shape == (40000, 7, 2) and found.mean is samples.mean
    flat, known = found.deviations.flatten(1), samples.deviations.flatten(1)
    exact = known.T @ known / 8
    assert (flat.T @ flat / 40000 - exact).norm() < 0.02 * exact.norm()
    assert samples.more(8, seeded()) is samples


def test_scores_hold_more_than_the_samples_of_the_weights_can():
    """Independent outputs, whose information adds up: of one by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    p = torch.from_numpy(3 * nodes).sigmoid()
    weights = torch.from_numpy(weights / weights.sum())
    mean = weights @ p
    noise = torch.special.entr(p) + torch.special.entr(1 - p)
    one = float(torch.special.entr(mean) + torch.special.entr(1 - mean) - weights @ noise)
    deviations = 3 * torch.randn(128, 15, 1, generator=seeded(), dtype=torch.float64)
    few = JointSamples(torch.zeros(15, 1, dtype=torch.float64), deviations)
    sums = [
        float(batch_bald(s.log_probabilities(), 15, seeded())[1].sum())
        for s in (few, few.more(2048, seeded()))
    ]
    assert sums[1] == pytest.approx(15 * one, rel=0.05)
    assert sums[0] < 0.9 * 15 * one


def test_scores_sum_to_the_joint_information_of_a_wide_posterior():
    la = posterior(name="bert")
    la.prior_precision = 1e-3
    found = la.acquire(loader(), 7, n_samples=64)
    many = joint_samples(la.fitted, loader(), None, 7, 4000, None, False)
    exact = joint_information(many.log_probabilities(), found.indices.tolist())
    assert float(found.scores.sum()) == pytest.approx(exact, rel=0.05)


def test_a_warning_says_from_where_on_picks_are_noise(monkeypatch):
    la = posterior(name="bert")
    la.prior_precision = 1e-4
    monkeypatch.setattr(acquire_file, "DRAWS", 64)
    with pytest.warns(UserWarning, match=r"ln\(64\) = 4.2.*method='bait'") as caught:
        scores = la.acquire(loader(), 7, n_samples=64).scores
    told = int(str(caught[0].message).split()[2])
    assert scores[: told - 1].sum() < math.log(64) - acquire_file.MARGIN <= scores[:told].sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.acquire(loader(), told, n_samples=64)
        la.acquire(loader(), 7, "bait")
    monkeypatch.setattr(acquire_file, "ROOM", 32 * 7 * 3)  # fewer draws of a larger pool
    with pytest.warns(UserWarning, match="32 samples"):
        la.acquire(loader(), 7, n_samples=20)


def random_samples(samples=8, examples=7, contrasts=2):
    generator = seeded()
    mean = torch.randn(examples, contrasts, generator=generator, dtype=torch.float64)
    shape = (samples, examples, contrasts)
    return JointSamples(mean, torch.randn(shape, generator=generator, dtype=torch.float64))


def left(rows, chosen):
    """The pool's mean predictive variance after labelling, by explicit inverse."""
    precision = torch.eye(rows.shape[2], dtype=rows.dtype)
    for n in chosen:
        precision = precision + rows[n].T @ rows[n]
    fisher = sum(R.T @ R for R in rows) / len(rows)
    return float((torch.linalg.inv(precision) @ fisher).trace())


def test_fisher_rows_hold_the_softmaxs_hessian():
    samples = random_samples()
    rows = fisher_rows(samples)
    for n in range(7):
        p = torch.nn.functional.pad(samples.mean[n], (1, 0)).softmax(0)[1:]
        hessian = p.diag() - p.outer(p)
        features = samples.deviations[:, n].T / 8**0.5
        assert_near(rows[n].T @ rows[n], features.T @ hessian @ features)


def test_bait_goes_forward_and_back_by_explicit_inverses():
    samples = random_samples()
    rows = fisher_rows(samples)
    chosen, worth = bait(samples, 2)
    forward = []
    for _ in range(4):
        rest = [n for n in range(7) if n not in forward]
        forward.append(min(rest, key=lambda n: left(rows, [*forward, n])))
    while len(forward) > 2:
        forward.remove(min(forward, key=lambda n: left(rows, [m for m in forward if m != n])))
    assert set(chosen.tolist()) == set(forward)
    whole = left(rows, chosen.tolist())
    for place, n in enumerate(chosen.tolist()):
        others = [m for m in chosen.tolist() if m != n]
        assert float(worth[place]) == pytest.approx(left(rows, others) - whole)
    assert worth[0] >= worth[1]


@pytest.mark.parametrize("name", ["bert", "llama-lm"])
def test_samples_of_the_pool_are_of_one_set_of_weights(name):
    la = posterior(name=name)
    batch = token_batch((3, 5, 4))
    found = joint_samples(la.fitted, batch, None, 2, 20000, None, False)
    mean, joint = Predictor(la.fitted).readout_moments(batch, CONTRASTS, joint=True)
    assert_near(found.mean, mean)
    flat = found.deviations.flatten(1)
    sampled = flat.T @ flat / len(flat)
    assert (sampled - joint[0]).norm() < 0.05 * joint.norm()


def test_calibrated_width_and_temperature_count():
    la = posterior(name="bert")
    batch = token_batch((3, 5, 4))
    before = joint_samples(la.fitted, batch, None, 2, 50, None, False)
    la.covariance_scale, la.likelihood_temperature = 4.0, 2.0
    after = joint_samples(la.fitted, batch, None, 2, 50, None, False)
    assert_near(after.mean, before.mean / 2)
    assert_near(after.deviations, before.deviations)


@pytest.mark.parametrize("method", METHODS)
def test_any_form_of_pool_gives_the_same_choice(method):
    la = posterior(name="bert")
    pool = loader(batch_size=2)
    found = la.acquire(pool, 3, method)
    assert len(found) == 3 and len(set(found.indices.tolist())) == 3
    again = la.acquire(loader(batch_size=7), 3, method)
    assert found.indices.tolist() == again.indices.tolist()
    assert_near(found.scores.double(), again.scores.double(), 1e-6)
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in pool.dataset]
    assert la.acquire(rows, 3, method, batch_size=3).indices.tolist() == found.indices.tolist()
    assert found.to_dict()["method"] == method


@pytest.mark.parametrize("method", ["batchbald", "bait"])
def test_a_generator_draws_other_samples(method):
    la = posterior(name="bert")

    def scores(*generator):
        return la.acquire(loader(), 3, method, generator=generator[0] if generator else None).scores

    other = torch.Generator().manual_seed(5)
    assert torch.equal(scores(), scores()) and torch.equal(scores(), scores(seeded()))
    assert not torch.equal(scores(), scores(other))


def test_single_scores_are_those_of_predict():
    la = posterior(name="bert")
    predictions = la.predict(loader())
    for method, column in (("entropy", "entropy"), ("bald", "mutual_information")):
        found = la.acquire(loader(), 7, method)
        values = getattr(predictions, column)
        assert found.indices.tolist() == values.argsort(descending=True).tolist()
        assert_near(found.scores, values.sort(descending=True).values)


@pytest.mark.parametrize("method", METHODS)
def test_a_loader_that_shuffles_is_refused(method):
    la, data = posterior(name="bert"), loader().dataset
    weighted = WeightedRandomSampler([1.0] * 7, 7)
    batches = BatchSampler(SubsetRandomSampler(range(7)), 2, False)
    for pool in (
        DataLoader(data, batch_size=2, shuffle=True),
        DataLoader(data, batch_size=2, sampler=weighted),
        DataLoader(data, batch_sampler=batches),
        DataLoader(data, batch_sampler=BatchSamplerShard(batches, 2, 0)),
        DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 1, 0)),
    ):
        with pytest.raises(ValueError, match="shuffle=False"):
            la.acquire(pool, 2, method)
    for in_order in (SequentialSampler(data), DistributedSampler(data, 1, 0, shuffle=False)):
        pool = DataLoader(data, batch_sampler=BatchSampler(in_order, 2, False))
        assert len(la.acquire(pool, 2, method)) == 2


def test_a_sampler_that_reorders_in_its_own_way_is_refused():
    la, data = posterior(name="bert"), loader().dataset
    lengths = [int(row["attention_mask"].sum()) for row in data]
    state = torch.get_rng_state()
    for sampler in (
        LengthGroupedSampler(2, lengths=lengths),
        DistributedLengthGroupedSampler(2, lengths=lengths, num_replicas=1, rank=0),
        sorted(range(7), key=lengths.__getitem__),
    ):
        with pytest.raises(ValueError, match=f"{type(sampler).__name__}.*shuffle=False"):
            la.acquire(DataLoader(data, batch_size=2, sampler=sampler), 2)
    batches = [[4, 2], [0, 1]]
    with pytest.raises(ValueError, match="order"):
        la.acquire(DataLoader(data, batch_sampler=batches), 2)
    assert torch.equal(state, torch.get_rng_state())
    chosen = la.acquire(DataLoader([data[n] for n in (1, 3, 6)], batch_size=2), 2)
    for part in (
        DataLoader(data, batch_size=2, sampler=[1, 3, 6]),
        DataLoader(data, batch_sampler=[[1, 3], [6]]),
    ):
        assert la.acquire(part, 2).indices.tolist() == chosen.indices.tolist()


def test_what_cannot_be_chosen_is_refused():
    la = posterior(name="bert")
    with pytest.raises(ValueError, match="method must be one of"):
        la.acquire(loader(), 2, "random")
    for method in ("bald", "bait"):
        with pytest.raises(ValueError, match="the pool has 7"):
            la.acquire(loader(), 8, method)
    for n in (0, 1.5):
        with pytest.raises(ValueError, match="a whole number, at least 1"):
            la.acquire(loader(), n)
    assert len(la.acquire(loader(), 2.0)) == 2
    with pytest.raises(ValueError, match="n_samples must be at least 2"):
        la.acquire(loader(), 1, n_samples=1)
    with pytest.raises(ValueError, match="empty"):
        la.acquire(DataLoader([]), 1)
    regression = KronLoraLaplace(peft_model("bert"), "regression", backend=LoraGGN)
    regression.fit(loader(likelihood="regression"))
    with pytest.raises(ValueError, match="likelihood='regression'"):
        regression.acquire(loader(), 1)
