"""What must change nothing: order and size of batches, side, amount and content of padding.

Found by hypothesis: it looks for a counterexample among texts, their order and their padding.
"""

import functools

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel
from laplace_lora.likelihoods.links import Link
from support.batches import LENGTHS, token_batch
from support.models import TARGETS, VOCABULARY, peft_model
from support.references import assert_near

FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
COUNT = len(LENGTHS)
POSTERIORS = {
    "dense": (KronLoraLaplace, {"factor_rank": None}),
    "reduced": (
        KronLoraLaplace,
        {"factor_rank": None, "backend_kwargs": {"kfac_approx": "reduce"}},
    ),
    "low-rank": (KronLoraLaplace, {"factor_rank": 2, "low_rank_threshold": 4}),
    "diagonal": (DiagLoraLaplace, {}),
}


@functools.cache
def classifier(name):
    """A model, which is never changed, wrapped."""
    targets = TARGETS if name.endswith("-lm") else None
    return LogitsModel(peft_model(name, r=1), target_ids=targets).eval()


@st.composite
def presentations(draw, sides=("left", "right")):
    """Draw a way to present the same examples: order, batch size, padding."""
    return {
        "order": draw(st.permutations(range(COUNT))),
        "size": draw(st.integers(1, COUNT)),
        "side": draw(st.sampled_from(sides)),
        "pad_to": max(LENGTHS) + draw(st.integers(0, 4)),
        "seed": draw(st.integers(0, 1000)),
    }


PLAIN = {
    "order": range(COUNT),
    "size": COUNT,
    "side": "right",
    "pad_to": max(LENGTHS),
    "seed": None,
}


def presented(order, size, side, pad_to, seed):
    """Return the examples in that way, with any tokens but zero as padding if there is a seed."""
    batch = token_batch(LENGTHS, pad_to=pad_to, side=side)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, VOCABULARY, batch["input_ids"].shape, generator=generator)
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"] == 1, tokens)
    examples = [{key: value[n] for key, value in batch.items()} for n in order]
    return DataLoader(examples, batch_size=size)


def summary(name, kind, way):
    """Fit a posterior; return its evidence, moments of examples in plain order, and of weights."""
    cls, options = POSTERIORS[kind]
    la = cls(classifier(name), "classification", **options)
    la.fit(presented(**way), evidence_correction=False)
    batch = next(iter(presented(**PLAIN)))
    mean, covariance = la._glm_predictive_distribution(batch)
    return la.log_marginal_likelihood().reshape(1), mean, covariance, la.weight_variance()


@functools.cache
def plain_summary(name, kind):
    return summary(name, kind, PLAIN)


@FEW
@given(kind=st.sampled_from(sorted(POSTERIORS)), way=presentations())
def test_fits_of_answer_tokens_see_the_real_tokens_only(kind, way):
    name = "llama-lm"
    assert_near(summary(name, kind, way), list(plain_summary(name, kind)), 1e-5)


@FEW
@given(kind=st.sampled_from(sorted(POSTERIORS)), way=presentations(sides=["right"]))
def test_fits_of_an_encoder_see_the_real_tokens_only(kind, way):
    """An encoder counts positions from the left, so padding stands on the right."""
    assert_near(summary("bert", kind, way), list(plain_summary("bert", kind)), 1e-5)


@functools.cache
def fitted(name):
    la = KronLoraLaplace(classifier(name), "classification")
    la.fit(presented(**PLAIN))
    return la


def predicted(name, way):
    """Return probabilities, moments and uncertainties of the examples in plain order."""
    found = fitted(name).predict(presented(**way))
    back = torch.tensor(list(way["order"])).argsort()
    values = (found.probs, found.mean, found.covariance, found.entropy, found.mutual_information)
    return [value[back] for value in values]


@FEW
@given(name=st.sampled_from(["llama-lm", "gpt2-lm"]), way=presentations())
def test_predictions_of_answer_tokens_see_the_real_tokens_only(name, way):
    assert_near(predicted(name, way), predicted(name, PLAIN), 1e-5)


@FEW
@given(way=presentations(sides=["right"]))
def test_predictions_of_an_encoder_see_the_real_tokens_only(way):
    assert_near(predicted("bert", way), predicted("bert", PLAIN), 1e-5)


@st.composite
def gaussians(draw):
    """Draw moments of a batch of logits, and a permutation of the classes."""
    classes = draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    options = {"generator": generator, "dtype": torch.float64}
    mean = draw(st.floats(0, 20)) * torch.randn(3, classes, **options)
    root = draw(st.floats(0, 5)) * torch.randn(3, classes, classes, **options)
    return mean, root @ root.mT, torch.tensor(draw(st.permutations(range(classes))))


@settings(FEW, max_examples=40)
@given(moments=gaussians(), shift=st.floats(-30, 30), common=st.floats(0, 30))
def test_what_all_logits_share_changes_no_probability(moments, shift, common):
    mean, covariance, _ = moments
    link = Link("quadrature")
    plain = link.log_probabilities(mean, covariance).exp()
    assert_near(plain.sum(-1), torch.ones(3, dtype=torch.float64), 1e-9)
    assert (
        link.log_probabilities(mean + shift, covariance + common).exp() - plain
    ).abs().max() < 1e-6


@settings(FEW, max_examples=40)
@given(moments=gaussians())
def test_the_order_of_the_classes_changes_no_probability(moments):
    mean, covariance, order = moments
    link = Link("quadrature")
    plain = link.log_probabilities(mean, covariance).exp()[:, order]
    permuted = link.log_probabilities(mean[:, order], covariance[:, order][:, :, order]).exp()
    assert (permuted - plain).abs().max() < 4e-3  # twice the error of the fixed points
