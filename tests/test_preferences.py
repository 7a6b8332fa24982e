"""Reward models: posteriors fitted on preference pairs, of rewards and of their differences."""

import copy
import math

import pytest
import torch
from laplace import DiagLaplace, KronLaplace, Laplace
from test_posterior import DENSE, LOW
from test_weight_sharing import albert
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from transformers import BatchEncoding, Trainer, TrainingArguments

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LaplaceCallback,
    LogitsModel,
    LoraGGN,
)
from laplace_lora.capture.recorder import record
from laplace_lora.data import distributed as sharding
from laplace_lora.tuning.validation_cache import Scoring
from laplace_lora.tuning.validation_search import grid_search
from tiny import PAD, adalora_model, assert_near, freeze_magnitudes, peft_model, token_batch

CHOSEN, REJECTED = (3, 6, 4, 6, 1), (5, 2, 4, 1, 7)
CLASSES = [
    (KronLoraLaplace, DENSE),
    (KronLoraLaplace, LOW),
    (DiagLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (DiagLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
]


def texts(lengths, seed, pad_to=None, side="right"):
    batch = token_batch(lengths, pad_to, side, seed=seed)
    return {key: value for key, value in batch.items() if key != "labels"}


def pair_batch(chosen=CHOSEN, rejected=REJECTED, seed=0, pad_to=(None, None), side="right"):
    """Pairs in TRL's names; both halves are padded to a length of their own."""
    halves = {
        "chosen": texts(chosen, 2 * seed, pad_to[0], side),
        "rejected": texts(rejected, 2 * seed + 1, pad_to[1], side),
    }
    return {f"{k}_{name}": v for name, half in halves.items() for k, v in half.items()}


def half_of(batch, name):
    return {k.removesuffix(f"_{name}"): v for k, v in batch.items() if k.endswith(f"_{name}")}


def loader(batch_size=2, batch=None, **kwargs):
    batch = pair_batch(**kwargs) if batch is None else batch
    size = len(next(iter(batch.values())))
    examples = [{key: value[n] for key, value in batch.items()} for n in range(size)]
    return DataLoader(examples, batch_size=batch_size)


def posterior(cls=KronLoraLaplace, name="llama", fit=True, **kwargs):
    la = cls(peft_model(name, num_labels=1), "reward_modeling", **kwargs)
    if fit:
        la.fit(loader())
    return la


def alone(batch, name, n):
    """The tokens of one text of a pair, without padding."""
    half = half_of(batch, name)
    return half["input_ids"][n : n + 1][half["attention_mask"][n : n + 1] == 1][None]


def reward_jacobians(model, batch, name):
    """Reward and its Jacobian for each text alone, by the PEFT model itself."""
    model = copy.deepcopy(model).eval()
    model.get_base_model().set_attn_implementation("eager")
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    rewards, rows = [], []
    for n in range(len(batch[f"input_ids_{name}"])):
        ids = alone(batch, name, n)

        def reward(w, ids=ids):
            return functional_call(model, w, kwargs={"input_ids": ids}).logits[0, 0]

        rewards.append(reward(weights))
        rows.append(torch.cat([j.flatten() for j in jacrev(reward)(weights).values()]))
    return torch.stack(rewards), torch.stack(rows)


def explicit(model, batch):
    """Rewards ``(batch, 2)`` and Jacobians ``(batch, 2, parameters)``, rejected first."""
    (r, J), (c, K) = (reward_jacobians(model, batch, name) for name in ("rejected", "chosen"))
    return torch.stack([r, c], 1), torch.stack([J, K], 1)


def explicit_ggn(model, batch):
    """``Σ_n p(1 − p) (j_chosen − j_rejected)(…)ᵀ``."""
    f, J = explicit(model, batch)
    p = (f[:, 1] - f[:, 0]).sigmoid()
    gap = J[:, 1] - J[:, 0]
    return (gap * (p * (1 - p)).unsqueeze(1)).T @ gap


@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left"), ("gpt2", "right")]
)
def test_rewards_and_jacobians_equal_those_of_each_text_alone(name, side):
    model = peft_model(name, num_labels=1)
    for pad_to in ((None, None), (7, 7), (11, 8)):
        batch = pair_batch(pad_to=pad_to, side=side)
        jacobians, f = LoraGGN(LogitsModel(model).eval(), "classification").jacobians(batch)
        rewards, expected = explicit(model, batch)
        assert_near(f, rewards)
        assert_near(jacobians, expected)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_ggn_of_a_pair_is_that_of_the_difference_from_one_backward_pass(name, monkeypatch):
    model, batch = peft_model(name, num_labels=1), pair_batch()
    backend = LoraGGN(LogitsModel(model).eval(), "classification")
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    loss, full = backend.full(batch, torch.ones(5, dtype=torch.long))
    assert len(passes) == 1
    monkeypatch.undo()
    exact = explicit_ggn(model, batch)
    assert_near(full, exact)
    la = DiagLoraLaplace(model, "reward_modeling")
    la.fit(loader())
    assert_near(la.H, exact.diag())
    f, _ = explicit(model, batch)
    assert_near(torch.tensor(la.loss), -F.logsigmoid(f[:, 1] - f[:, 0]).sum().float().cpu(), 1e-6)
    assert_near(loss, -F.logsigmoid(f[:, 1] - f[:, 0]).sum())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_kfac_factors_equal_a_loop_over_the_tokens_of_both_texts(name):
    model, batch = peft_model(name, num_labels=1).eval(), pair_batch(pad_to=(9, 8))
    backend = LoraGGN(LogitsModel(model).eval(), "classification")
    labels = torch.ones(len(CHOSEN), dtype=torch.long)
    _, kron = backend.kron(batch, labels, N=len(CHOSEN))
    sums = [[0.0, 0.0] for _ in backend.maps]
    for n in range(len(CHOSEN)):
        calls = [[] for _ in backend.maps]
        hooks = [
            linear.module.register_forward_hook(lambda m, a, out, to=to: to.append((a[0], out)))
            for linear, to in zip(backend.maps, calls, strict=True)
        ]
        r, c = (model(alone(batch, half, n)).logits[0, 0] for half in ("rejected", "chosen"))
        for hook in hooks:
            hook.remove()
        p = (c - r).sigmoid().detach()
        scaled = (p * (1 - p)).sqrt() * (c - r)
        for linear, found, total in zip(backend.maps, calls, sums, strict=True):
            # A decoder's head runs on all tokens here, of which the last one counts.
            at = slice(-1, None) if "score" in linear.name else slice(None)
            x = torch.cat([a.detach().reshape(-1, a.shape[-1])[at] for a, _ in found])
            g = torch.autograd.grad(scaled, [out for _, out in found], retain_graph=True)
            g = torch.cat([each.reshape(-1, each.shape[-1])[at] for each in g])
            total[0] = total[0] + g.T @ g
            total[1] = total[1] + x.T @ x / len(x) / len(CHOSEN)
    for block, factors in zip(backend.blocks, kron.kfacs, strict=True):
        expected = sums[block.map]
        assert_near(factors, expected[:1] if block.is_bias else expected)


@pytest.mark.parametrize("kind", ["albert", "adalora", "dora", "embedding"])
def test_other_adapters_run_on_both_texts(kind):
    """Layers called several times a text, several maps a module, maps called once more."""
    if kind == "albert":
        model = albert().model
        model.get_base_model().classifier = torch.nn.Linear(16, 1).double()
    elif kind == "adalora":
        model = adalora_model("bert", num_labels=1)
    elif kind == "dora":
        model = freeze_magnitudes(peft_model("bert", num_labels=1, use_dora=True))
    else:
        model = peft_model("bert", num_labels=1, target_modules=["word_embeddings"])
    backend = LoraGGN(LogitsModel(model).eval(), "classification")
    batch = pair_batch()
    jacobians, f = backend.jacobians(batch)
    rewards, expected = explicit(model, batch)
    assert_near(f, rewards)
    assert_near(jacobians, expected)
    backend.kron(batch, torch.ones(5, dtype=torch.long), N=5)


def test_projections_share_the_inputs_of_both_texts():
    model = LogitsModel(peft_model("llama", num_labels=1, modules_to_save=None)).eval()
    maps = LoraGGN(model, "classification").maps
    for dtype in (torch.float64, torch.bfloat16):  # cast for each adapter
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        groups = record(model, maps, pair_batch()).input_groups
        named = {maps[i].name: maps[group].name for i, group in enumerate(groups)}
        shared = {name: first for name, first in named.items() if "v_proj.lora_A" in name}
        assert len(shared) == 2
        assert all(first == name.replace("v_proj", "q_proj") for name, first in shared.items())


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_variances_equal_explicit_jacobians(cls, kwargs, name):
    la = posterior(cls, name, **kwargs)
    la.optimize_prior_precision()
    batch = pair_batch(seed=3)
    f, J = explicit(la.logits_model.model, batch)
    last = [name for name, p in la.logits_model.model.named_parameters() if p.requires_grad][-1]
    J = J[:, :, -la.n_params :] if "score" in last or "classifier" in last else J
    P = la.posterior_precision
    P = P.diag() if isinstance(P, torch.Tensor) and P.ndim == 1 else P
    P = P if isinstance(P, torch.Tensor) else P.to_matrix()
    covariance = J @ torch.linalg.inv(P) @ J.mT
    mean, variance = la.reward_difference(batch)
    assert_near(mean, f[:, 1] - f[:, 0])
    gap = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    assert_near(variance, gap)
    assert (variance - covariance[:, 0, 0] - covariance[:, 1, 1]).norm() > 1e-3 * gap.norm()
    for i, half in enumerate(("rejected", "chosen")):
        mean, variance = la(half_of(batch, half))
        assert mean.shape == (5, 1) and variance.shape == (5, 1, 1)
        assert_near(mean[:, 0], f[:, i])
        assert_near(variance[:, 0, 0], covariance[:, i, i])


def test_joint_covariances_of_candidates_give_the_same_differences():
    la, batch = posterior(), pair_batch((4, 4), (4, 4), seed=2)
    candidates = {
        key: torch.cat([half_of(batch, half)[key] for half in ("chosen", "rejected")])
        for key in ("input_ids", "attention_mask")
    }
    mean, covariance = la(candidates, joint=True)
    difference, variance = la.reward_difference(batch)
    assert_near(mean[:2] - mean[2:], difference)
    d = covariance.diag()
    assert_near(d[:2] + d[2:] - 2 * covariance[:2, 2:].diag(), variance)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_probabilities_follow_from_the_difference(cls, kwargs):
    la, batch = posterior(cls, **kwargs), pair_batch(seed=1)
    mean, variance = la.reward_difference(batch)
    probit = (mean / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
    assert_near(la(batch), torch.stack([1 - probit, probit], 1))
    generator = torch.Generator().manual_seed(0)
    sampled = la(batch, link_approx="mc", n_samples=50_000, generator=generator)
    # 0.04: what probit itself is off by is far less.
    torch.testing.assert_close(sampled[:, 1], probit, atol=0.04, rtol=0)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)
    exact = ((mean[:, None] + variance.sqrt()[:, None] * grid).sigmoid() * density).sum(1)
    torch.testing.assert_close(sampled[:, 1], exact / density.sum(), atol=0.01, rtol=0)
    assert_near(la(batch, fitting=True), la(batch))
    rewards = la._nn_functional_samples(batch, 7, torch.Generator().manual_seed(1))
    by_weights = la(
        batch, "nn", link_approx="mc", n_samples=7, generator=torch.Generator().manual_seed(1)
    )
    assert rewards.shape == (7, 5, 2)
    assert_near(by_weights[:, 1], (rewards[..., 1] - rewards[..., 0]).sigmoid().mean(0))
    with pytest.raises(ValueError, match="use 'probit' or 'mc'"):
        la(batch, link_approx="bridge")


def test_rewards_sampled_for_pairs_share_their_weights():
    la, batch = posterior(FullLoraLLLaplace), pair_batch(seed=1)
    pairs = la._nn_functional_samples(batch, 3, torch.Generator().manual_seed(1))
    for i, half in enumerate(("rejected", "chosen")):
        alone = la._nn_functional_samples(half_of(batch, half), 3, torch.Generator().manual_seed(1))
        assert_near(pairs[..., i], alone[..., 0])


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_the_fit_does_not_depend_on_batches_padding_and_form(cls, kwargs):
    reference = posterior(cls, **kwargs)
    batch = pair_batch()
    turned = {
        key.replace(*ends): value
        for key, value in batch.items()
        for ends in (("chosen", "rejected") if "chosen" in key else ("rejected", "chosen"),)
    }
    wide = pair_batch(pad_to=(9, 9))
    stacked = {
        key: torch.cat([half_of(wide, half)[key] for half in ("chosen", "rejected")])
        for key in ("input_ids", "attention_mask")
    }
    forms = {
        "one by one": loader(1),
        "left": loader(3, pad_to=(8, 10), side="left"),
        "labelled": loader(5, {**batch, "labels": torch.ones(5)}),
        "turned": loader(5, {**turned, "labels": torch.zeros(5, dtype=torch.long)}),
        "encoding": DataLoader([0], collate_fn=lambda _: BatchEncoding({**batch, "margin": 0})),
        "and labels": DataLoader([0], collate_fn=lambda _: (batch, torch.ones(5))),
        "stacked": DataLoader([0], collate_fn=lambda _: stacked),
    }
    new = pair_batch(seed=1)
    for form in forms.values():
        la = posterior(cls, fit=False, **kwargs)
        la.fit(form)
        assert la.n_data == 5
        assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
        assert_near(la(new), reference(new))


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_laplace_torch_fits_the_same_posterior(structure):
    model = LogitsModel(peft_model("bert", num_labels=1))
    plain = {"kron": KronLaplace, "diag": DiagLaplace}[structure]
    theirs = plain(model, "reward_modeling", backend=LoraGGN)
    theirs.fit(loader(batch={**pair_batch(), "labels": torch.ones(5, dtype=torch.long)}))
    ours = Laplace(
        model,
        "reward_modeling",
        subset_of_weights="lora",
        hessian_structure=structure,
        **(DENSE if structure == "kron" else {}),
    )
    ours.fit(loader())
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood().double())
    single = texts((4, 4), seed=5)
    assert_near(list(ours(single)), list(theirs(single, pred_type="glm")))


def test_last_layer_curvature_is_that_of_the_features_difference():
    la = posterior(FullLoraLLLaplace, "bert")
    batch = pair_batch()
    model = la.logits_model.eval()
    (rejected, r), (chosen, c) = (
        model.features(half_of(batch, half)) for half in ("rejected", "chosen")
    )
    p = (c - r).sigmoid().detach()
    gap = F.pad((chosen - rejected).detach(), (0, 1))  # a shift of all rewards changes nothing
    assert_near(la.H, (gap * p * (1 - p)).T @ gap)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_tuning_judges_pairs_as_a_binary_classifier(cls, kwargs):
    la, pairs = posterior(cls, **kwargs), pair_batch(seed=4)
    pairs["labels"] = torch.tensor([1, 0, 1, 1, 0])
    validation = loader(2, pairs)

    def nll(link):
        return -la(pairs, link_approx=link)[range(5), pairs["labels"]].log().mean()

    grid = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    scoring = Scoring.of(la, "probit", 10)
    best, losses = grid_search(la, validation, grid, scoring, None, False)
    for precision, loss in zip(grid, losses, strict=True):
        la.prior_precision = precision
        assert_near(loss, nll("probit"))
    assert best == grid[losses.argmin()]
    for options in ({"method": "gridsearch", "grid_size": 5}, {"method": "val_gd", "n_steps": 5}):
        la.optimize_prior_precision(val_loader=validation, link_approx="mc", **options)
    if cls is not FullLoraLLLaplace:
        la.optimize_prior_precision(prior_structure="layerwise")
    la.optimize_prior_precision()
    evidence, tuned = la.log_marginal_likelihood(), la.prior_precision
    for factor in (0.8, 1.25):  # the evidence is asked at a prior, and keeps it
        assert la.log_marginal_likelihood(tuned * factor) < evidence
    la.prior_precision = tuned
    calibration = la.calibrate(validation)
    assert calibration.nll_after <= calibration.nll_before
    # The cache of a calibration is exact to a percent.
    assert calibration.nll_after == pytest.approx(nll("probit").item(), rel=0.01)


def test_grid_search_by_sampled_weights_needs_no_labels():
    la = posterior(**LOW)
    options = {"val_loader": loader(), "grid_size": 3, "n_samples": 3}
    la.optimize_prior_precision("nn", "gridsearch", **options)
    assert la.prior_precision.item() in torch.logspace(-4, 4, 3).tolist()


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_saving_and_merging(cls, kwargs, tmp_path):
    la = posterior(cls, prior_precision=2.0, **kwargs)
    la.save_pretrained(tmp_path)
    again = cls.from_pretrained(la.logits_model.model, tmp_path)
    new = pair_batch(seed=1)
    torch.testing.assert_close(again(new), la(new), rtol=0, atol=0)
    examples = loader().dataset
    first, second = (
        cls(la.logits_model.model, "reward_modeling", **kwargs, prior_precision=2.0)
        for _ in range(2)
    )
    first.fit(DataLoader(examples[:2]))
    second.fit(DataLoader(examples[2:]))
    first.merge([second])
    assert first.n_data == 5
    assert_near(first(new), la(new), 1e-4 if kwargs == LOW else 1e-6)


def test_shares_of_a_sampler_count_pairs(monkeypatch):
    batch = pair_batch()
    assert sharding.batch_length(batch) == 5
    assert {len(v) for v in sharding.first_examples(batch, 2).values()} == {2}
    la = posterior(fit=False)
    examples = loader(pad_to=(9, 9)).dataset

    def stacked(rows):
        halves = [half_of(row, name) for name in ("chosen", "rejected") for row in rows]
        return {key: torch.stack([half[key] for half in halves]) for key in halves[0]}

    monkeypatch.setattr(sharding, "processes", lambda: 2)
    sampler = DistributedSampler(examples, 2, 1, shuffle=False)
    data = DataLoader(examples, 2, sampler=sampler, collate_fn=stacked)
    batches = list(sharding.own_batches(data, map(la.by_example, data)))
    assert [len(b["labels"]) for b in batches] == [2]  # of five, two are process 1's
    assert torch.equal(batches[0]["input_ids_rejected"][1], examples[3]["input_ids_rejected"])


def test_memory_is_estimated_for_pairs():
    la = posterior(fit=False)
    both = la.estimate_memory(pair_batch(pad_to=(8, 8)))
    one = la.estimate_memory(texts(CHOSEN, 0, 8))
    assert both.activations > 1.5 * one.activations


class RewardTrainer(Trainer):
    """TRL's loss, on the chosen texts and then the rejected ones."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = model(**inputs).logits.chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()


def test_trainer_callback(tmp_path):
    examples = [
        {f"{half}_ids": alone(pair_batch(), half, n)[0] for half in ("chosen", "rejected")}
        for n in range(5)
    ]

    def stacked(rows):
        ids = [row[f"{half}_ids"] for half in ("chosen", "rejected") for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(ids, True, PAD)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    model = peft_model("bert", num_labels=1, dtype=torch.float32)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = RewardTrainer(
        model, arguments, stacked, train_dataset=examples, eval_dataset=examples
    )
    callback = LaplaceCallback(trainer, "reward_modeling")
    trainer.add_callback(callback)
    trainer.train()
    reference = KronLoraLaplace(model, "reward_modeling")
    reference.fit(loader())
    assert callback.la.n_data == 5
    reference.prior_precision = callback.la.prior_precision
    p = reference(pair_batch())
    assert_near(callback.predict(examples), p, 1e-4)
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert logged["eval_laplace_nll"] == pytest.approx(-p[:, 1].log().mean().item(), rel=1e-4)


BATCH = pair_batch()
SINGLE = texts(CHOSEN, 0)


@pytest.mark.parametrize("cls,kwargs", [(KronLoraLaplace, LOW), (FullLoraLLLaplace, {})])
@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (
            half_of(BATCH, "rejected") | {"input_ids_chosen": BATCH["input_ids_chosen"]},
            ValueError,
            r"lacks \['input_ids_rejected'\]",
        ),
        (
            {k: v for k, v in BATCH.items() if k != "attention_mask_chosen"},
            ValueError,
            r"lacks \['attention_mask_chosen'\]",
        ),
        (
            {k: v[:3] if "chosen" in k else v for k, v in BATCH.items()},
            ValueError,
            r"\[3, 3\] chosen, but \[5, 5\] rejected",
        ),
        ({**BATCH, "labels": torch.tensor([0, 1, 2, 0, 1])}, ValueError, "1 where the chosen"),
        ({**BATCH, "labels": torch.tensor([0.0, 0.3, 1, 0, 1])}, ValueError, "1 where the chosen"),
        ({**BATCH, "labels": torch.ones(4)}, ValueError, "labels of 5 pairs must be 5 values"),
        ({**BATCH, "margin": torch.ones(5)}, ValueError, "remove 'margin'"),
        ({**SINGLE, "labels": torch.randn(5)}, ValueError, r"fitted on pairs: .* got 5 rows"),
        (SINGLE, ValueError, r"fitted on pairs: .* got 5 rows"),
        (SINGLE["input_ids"], TypeError, "got Tensor"),
        ((SINGLE["input_ids"], torch.ones(5)), TypeError, "got tuple"),
    ],
)
def test_bad_batches_are_refused_and_nothing_is_lost(cls, kwargs, batch, error, match):
    la = posterior(cls, **kwargs)
    before = la(BATCH), la.log_marginal_likelihood()
    bad = DataLoader([0], collate_fn=lambda _: batch)
    with pytest.raises(error, match=match):
        la.fit(bad)
    with pytest.raises(error, match=match):
        la.optimize_prior_precision(method="gridsearch", val_loader=bad, grid_size=2)
    torch.testing.assert_close(la(BATCH), before[0], rtol=0, atol=0)
    assert la.log_marginal_likelihood() == before[1]
    transformer = la.logits_model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer)


def test_models_and_calls_that_do_not_fit():
    with pytest.raises(ValueError, match="one output, this one 3"):
        KronLoraLaplace(peft_model("bert"), "reward_modeling")
    with pytest.raises(ValueError, match="one output, this one 2"):
        KronLoraLaplace(peft_model("llama-lm"), "reward_modeling", target_ids=[3, 5])
    two = LogitsModel(peft_model("bert", num_labels=1), output=lambda o: o.logits.repeat(1, 2))
    with pytest.raises(ValueError, match="one output, this one 2"):
        KronLoraLaplace(two, "reward_modeling").fit(loader())
    with pytest.raises(ValueError, match="takes no pairs"):
        FunctionalLoraLLLaplace(peft_model("bert", num_labels=1), "reward_modeling", 3)
    la = posterior()
    with pytest.raises(ValueError, match="a difference needs pairs"):
        la.reward_difference(SINGLE)
    with pytest.raises(ValueError, match="a difference needs pairs"):
        la(SINGLE, fitting=True)
    with pytest.raises(AttributeError, match="not fitted"):
        posterior(fit=False).reward_difference(BATCH)


def test_layers_that_run_unevenly_on_the_two_texts_are_named():
    class Uneven(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, batch):
            chosen, rejected = batch["x_chosen"], batch["x_rejected"]
            twice = self.layer(chosen) + self.layer(chosen)
            return torch.cat([self.layer(rejected), twice], -1)

    batch = {"x_chosen": torch.randn(2, 3), "x_rejected": torch.randn(2, 3)}
    with pytest.raises(RuntimeError, match="'layer' ran 3 times"):
        LoraGGN(Uneven(), "classification").jacobians(batch)


def test_reduce_sees_no_difference_at_the_head():
    """Gradients of the two rewards are opposite, so their sum at the head is nothing: a limit."""
    reduce = {"backend_kwargs": {"kfac_approx": "reduce"}}
    la = posterior(KronLoraLLLaplace, "llama", **reduce)
    assert la.log_det_ratio.item() == pytest.approx(0, abs=1e-12)
    assert posterior(KronLoraLLLaplace, "llama").log_det_ratio > 0.01
