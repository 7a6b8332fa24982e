"""Layers that see several rows of an example: choices, windows, tokens, flattened pairs."""

import pytest
import torch
from laplace import Laplace
from peft import AdaLoraConfig
from torch import nn

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraGGN,
)
from laplace_lora.data.examples import Examples
from support.batches import rows
from support.models import peft_model
from support.references import assert_near, explicit_ggn, looped_jacobians
from support.rows_apart import (
    CHOICES,
    IMAGES,
    TEXTS,
    FlattenedPairs,
    batch_of,
    choice_batch,
    loader_of,
    looped_factors,
    wrapped,
)


@pytest.mark.parametrize("name", [*TEXTS, *IMAGES])
def test_jacobians_and_factors_equal_those_of_each_example_alone(name):
    model, batch = wrapped(name), batch_of(name)
    backend = LoraGGN(model, "classification")
    jacobians, f = backend.jacobians(batch)
    assert_near(f, model(batch).detach())
    assert_near(jacobians, looped_jacobians(model, batch))
    _, full = backend.full(batch, batch["labels"])
    assert_near(full, explicit_ggn(model, batch).detach())
    _, kron = backend.kron(batch, batch["labels"], N=len(f))
    for ours, theirs in zip(kron.kfacs, looped_factors(backend, batch), strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("name", ["bert", "deberta", "swin", "convnext"])
def test_factors_do_not_depend_on_batches(name):
    la = KronLoraLaplace(wrapped(name), "classification")
    found = []
    for batch_size in (7, 1, 2):
        la.fit(loader_of(batch_of(name), batch_size))
        found.append([f.matrix for factors in la.curvature.kfacs for f in factors])
    assert_near(found[1], found[0])
    assert_near(found[2], found[0])


@pytest.mark.parametrize(("examples", "shape"), [(5, (1, 6)), (5, (5, 3, 6)), (1, (1, 6))])
def test_choices_may_share_a_row_of_positions(examples, shape):
    model, batch = wrapped("bert"), rows(choice_batch(), slice(examples))
    backend = LoraGGN(model, "classification")
    expected, _ = backend.jacobians(batch)
    shared = {**batch, "position_ids": torch.arange(6).expand(shape)}
    jacobians, _ = LoraGGN(model, "classification").jacobians(shared)  # which verifies the batch
    assert_near(jacobians, expected)


@pytest.mark.filterwarnings("ignore:the model itself answers a padded text otherwise")
@pytest.mark.parametrize(("pad_to", "side"), [(9, "right"), (6, "left"), (11, "left")])
def test_padding_of_choices_changes_nothing(pad_to, side):
    backend = LoraGGN(wrapped("deberta"), "classification")
    labels = choice_batch()["labels"]
    _, reference = backend.kron(choice_batch(), labels, N=5)
    _, padded = backend.kron(choice_batch(pad_to=pad_to, side="right"), labels, N=5)
    for ours, theirs in zip(padded.kfacs, reference.kfacs, strict=True):
        assert_near(ours, theirs)
    # Positions are absolute in BERT, so left padding is another text there, and masks still count.
    batch = choice_batch(pad_to=pad_to, side=side)
    other = LoraGGN(wrapped("bert"), "classification")
    _, kron = other.kron(batch, labels, N=5)
    for ours, theirs in zip(kron.kfacs, looped_factors(other, batch), strict=True):
        assert_near(ours, theirs)


def test_a_multiple_choice_model_from_fit_to_file(tmp_path):
    model = wrapped("bert").model
    la = KronLoraLaplace(model, "classification")
    loader = loader_of(choice_batch(), 2)
    la.fit(loader)
    la.optimize_prior_precision()
    assert la.tuning.method == "loo" and la.n_outputs == 3 and la.logits_model.n_outputs is None
    batch = choice_batch([[4, 2, 3], [1, 5, 2]])
    la.save_pretrained(tmp_path, precision="exact")
    assert torch.equal(KronLoraLaplace.from_pretrained(model, tmp_path)(batch), la(batch))
    found = la.predict(loader)
    assert_near(found[1:2].probs, la(rows(choice_batch(), slice(1, 2))))
    la.calibrate(loader)
    exact = la(batch, method="exact")
    sampled = la(batch, method="sampled", n_samples=400)
    torch.testing.assert_close(sampled, exact, atol=0.04, rtol=0)


def test_texts_that_are_no_choices_are_refused_by_the_shape_of_a_question():
    """A row of a data set, a question with its choices, has the dimensions of a batch of texts."""
    row = {k: v[0] for k, v in choice_batch().items() if k != "labels"}
    with pytest.raises(ValueError, match=r"takes \(questions, choices, tokens\)"):
        wrapped("bert")(row)


def test_the_evidence_of_choices_is_the_exact_ones():
    full = FullLoraLaplace(wrapped("roberta"), "classification", prior_precision=2.0)
    full.fit(loader_of(choice_batch(), 2))
    ggn = explicit_ggn(full.logits_model, choice_batch()).detach()
    assert_near(full.log_det_ratio, torch.logdet(torch.eye(len(ggn)).double() + ggn / 2))


def test_maps_that_sum_over_tokens_sum_over_rows_too():
    """AdaLoRA's singular values, and layer norms: exact diagonals."""
    adalora = {"init_r": 2, "target_r": 1, "total_step": 9, "tfinal": 1, "r": 8}
    model, batch = wrapped("bert", lora=AdaLoraConfig, **adalora), choice_batch()
    jacobians, _ = LoraGGN(model, "classification").jacobians(batch)
    assert_near(jacobians, looped_jacobians(model, batch))
    model = wrapped("swin")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layernorm_before" in name or "fc1.lora" in name)
    backend = LoraGGN(model, "classification", uncovered="diag")
    assert any(linear.is_diagonal and linear.module is not None for linear in backend.maps)
    jacobians, _ = backend.jacobians(batch_of("swin"))
    assert_near(jacobians, looped_jacobians(model, batch_of("swin")))


class Flat(nn.Module):
    """A layer that sees every token of a batch as a row, as routers of experts do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 4).double().requires_grad_(False)
        self.layer, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, batch):
        x, mask = self.embedding(batch["input_ids"]), batch["attention_mask"]
        hidden = self.layer(x.reshape(-1, 4)).tanh().view(*x.shape[:2], 5)
        return self.head((hidden * mask.unsqueeze(-1)).sum(1))


def test_tokens_that_are_rows_are_masked_like_others():
    model = Flat()
    batch = {"input_ids": torch.arange(18).view(3, 6), "labels": torch.arange(3)}
    batch["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 5 + [0]])
    backend = LoraGGN(model, "classification")
    assert_near(backend.jacobians(batch)[0], looped_jacobians(model, batch))
    _, kron = backend.kron(batch, batch["labels"], N=3)
    for ours, theirs in zip(kron.kfacs, looped_factors(backend, batch), strict=True):
        assert_near(ours, theirs)
    wider = {k: torch.nn.functional.pad(v, (0, 2)) for k, v in batch.items() if k != "labels"}
    _, padded = backend.kron({**wider, "labels": batch["labels"]}, batch["labels"], N=3)
    for ours, theirs in zip(padded.kfacs, kron.kfacs, strict=True):
        assert_near(ours, theirs)


class Scattered(nn.Module):
    """Rows whose examples take turns, ``x_1a x_2a x_1b x_2b``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 1).double()

    def forward(self, x):
        flat = x.transpose(0, 1).reshape(-1, 4)
        return self.head(self.layer(flat).tanh()).view(x.shape[1], len(x)).T


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_rows_that_do_not_stand_together_are_refused_at_every_batch_size(examples):
    x = torch.randn(examples, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(RuntimeError, match=r"show.* at others"):
        LoraGGN(Scattered(), "classification").jacobians(x)
    model = Scattered()
    jacobians, _ = LoraGGN(model, "classification", uncovered="diag").jacobians(x)
    parameters = list(model.parameters())
    for n in range(examples):
        for c, out in enumerate(model(x[n : n + 1])[0]):
            grads = torch.autograd.grad(out, parameters, retain_graph=True)
            assert_near(jacobians[n, c], torch.cat([g.flatten() for g in grads]))


class Routed(nn.Module):
    """An expert that sees the tokens of which it is told, however many an example has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.expert, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, batch):
        x, chosen = batch["x"], batch["chosen"].bool()
        hidden = x.new_zeros(*x.shape[:2], 5)
        hidden[chosen] = self.expert(x[chosen]).tanh()
        return self.head(hidden.sum(1))


def test_rows_whose_number_depends_on_the_data_are_not_dealt_out_by_it():
    """Two tokens of each example pass; one and three are as many, and would be mixed up."""
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    even = {"x": x, "chosen": torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]])}
    with pytest.raises(RuntimeError, match=r"'expert' received an input of shape \(4, 4\)"):
        LoraGGN(Routed(), "classification").jacobians(even)
    uneven = {"x": x, "chosen": torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])}
    model = Routed()
    backend = LoraGGN(model, "classification", uncovered="diag")
    for batch in (even, uneven):
        expected = looped_jacobians(model, {**batch, "labels": torch.arange(2)})
        assert_near(backend.jacobians(batch)[0], expected)


def test_images_of_several_in_one_tensor_are_not_dealt_out():
    pixels = torch.zeros(4, 3, 8, 8)
    text = {"input_ids": torch.zeros(2, 5), "pixel_values": pixels}  # one image and three, say
    assert not Examples(2, [text]).have(torch.zeros(4, 9, 6))
    assert Examples(2, [{"pixel_values": pixels[:2]}]).have(torch.zeros(8, 9, 6))
    with_text = {"input_ids": torch.zeros(2, 5), "pixel_values": pixels[:2]}
    assert not Examples(2, [with_text]).have(torch.zeros(8, 9, 6))
    assert Examples(2, [with_text]).have(torch.zeros(10, 6))  # the tokens
    shared = {"input_ids": torch.zeros(2, 5), "position_ids": torch.zeros(1, 5)}
    assert Examples(2, [shared]).have(torch.zeros(10, 6))
    of_one = {"input_ids": torch.zeros(2, 5), "pixel_values": pixels[:1]}  # of one text of two
    assert not Examples(2, [of_one]).have(torch.zeros(10, 6))


def reward_model():
    return FlattenedPairs(peft_model("bert", num_labels=1))


def test_laplace_torch_fits_its_own_reward_models():
    """Pairs flattened inside the forward pass, which writes into the batch."""
    model, batch = reward_model().eval(), choice_batch([row[:2] for row in CHOICES])
    la = Laplace(
        model,
        "reward_modeling",
        subset_of_weights="all",
        hessian_structure="diag",
        backend=LoraGGN,
    )
    la.fit(loader_of(batch, 2))

    assert_near(la.H, explicit_ggn(LogitsModel(model).eval(), batch).diag().detach())


def test_our_posteriors_take_them_as_they_are():
    model = reward_model().eval()
    batch = choice_batch([row[:2] for row in CHOICES])
    la = KronLoraLaplace(model, "classification")
    la.fit(loader_of(batch, 3))
    assert batch["input_ids"].ndim == 3
    texts = [{k: batch[k][:, c] for k in ("input_ids", "attention_mask")} for c in (0, 1)]
    rewards = torch.cat([model.inner(**text).logits for text in texts], dim=1)
    assert_near(la.logits_model.eval()(batch), rewards)
    diagonal = DiagLoraLaplace(model, "classification")
    diagonal.fit(loader_of(batch, 2))
    assert_near(diagonal.H, explicit_ggn(la.logits_model, batch).diag().detach())
    assert la(batch).shape == (5, 2)


def test_stacked_pairs_are_a_reward_models_pairs_with_the_labels_winner():
    model, batch = reward_model().eval(), choice_batch([row[:2] for row in CHOICES])
    la = KronLoraLaplace(model, "reward_modeling")
    la.fit(loader_of(batch, 2))
    apart = KronLoraLaplace(model.inner, "reward_modeling")
    halves = {
        f"{key}{suffix}": batch[key][:, c]
        for key in ("input_ids", "attention_mask")
        for c, suffix in enumerate(("_rejected", "_chosen"))
    }
    apart.fit(loader_of({**halves, "labels": batch["labels"]}, 2))
    assert_near(la.log_marginal_likelihood(), apart.log_marginal_likelihood())
    assert_near(la.reward_difference(batch), apart.reward_difference(halves))
    single = {k: v[:, 0] for k, v in batch.items() if k != "labels"}
    assert_near(la(single), apart(single))


def test_examples_may_have_different_numbers_of_choices():
    """The sums of a fit are those of all examples; what must be one table is refused by name."""
    three, two = choice_batch(), choice_batch([row[:2] for row in CHOICES])
    la = DiagLoraLaplace(wrapped("bert").model, "classification")
    la.fit(torch.utils.data.DataLoader([three, two], batch_size=None))
    model = la.logits_model.eval()
    exact = sum(explicit_ggn(model, batch).diag() for batch in (three, two))
    assert_near(la.H, exact.detach())
    la.optimize_prior_precision()
    assert la.tuning.method == "marglik" and "different numbers" in la.tuning.reason
    for batch, choices in ((two, 2), (three, 3)):
        found = la.predict(batch)
        assert_near(found.probs, la(batch))
        assert found.probs.shape == (5, choices) and bool((found.mutual_information > 0).all())
    with pytest.raises(ValueError, match="different numbers of outputs or choices"):
        la.predict([three, two])


class Prompted(nn.Module):
    """Images compared with prompts that are always the same, as by CLIP."""

    def __init__(self, prompts):
        super().__init__()
        torch.manual_seed(0)
        self.prompts = torch.randn(prompts, 4).double()
        self.text, self.image = nn.Linear(4, 5).double(), nn.Linear(12, 5).double()

    def forward(self, batch):
        images = self.image(batch["pixel_values"].flatten(1)).tanh()
        return images @ self.text(self.prompts).tanh().T


@pytest.mark.parametrize("prompts", [3, 4, 6])
@pytest.mark.parametrize("examples", [1, 2, 3])
def test_layers_that_see_no_example_are_refused_by_name_or_get_the_diagonal(prompts, examples):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(examples, 3, 2, 2, generator=generator, dtype=torch.float64)
    batch, model = {"pixel_values": pixels, "labels": torch.arange(examples)}, Prompted(prompts)
    with pytest.raises(RuntimeError, match=r"text(\.weight)?'"):
        LoraGGN(model, "classification").jacobians(batch)
    backend = LoraGGN(model, "classification", uncovered="diag")
    assert_near(backend.jacobians(batch)[0], looped_jacobians(model, batch))
    assert [linear.is_diagonal for linear in backend.maps] == [False, True, True]


def test_last_layers_of_choices_are_refused_by_name():
    la = KronLoraLLLaplace(wrapped("bert").model, "classification")
    with pytest.raises(RuntimeError, match=r"once per example.*KronLoraLaplace"):
        la.fit(loader_of(choice_batch(), 2))


@pytest.mark.parametrize("link", ["quadrature", "probit", "mc"])
def test_a_question_with_a_single_choice_is_refused(link):
    """One logit used to be read as the contrast of two classes by some links."""
    la = KronLoraLaplace(wrapped("bert"), "classification")
    la.fit(loader_of(batch_of("bert"), 7))
    batch = choice_batch(lengths=[(4,), (6,)])
    with pytest.raises(ValueError, match="a single choice has nothing to choose"):
        la(batch, link_approx=link)
    with pytest.raises(ValueError, match="a single choice has nothing to choose"):
        la.predict([batch])
