"""Posteriors of language models: which tokens count, exact curvature, Monte-Carlo curvature."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, KronLoraLLLaplace, LogitsModel, LoraEF
from laplace_lora.data.labels import IGNORED, token_labels
from laplace_lora.likelihoods import roots as likelihoods_module
from laplace_lora.likelihoods.roots import hessian_root
from laplace_lora.models.token_model import TokenModel
from tiny import VOCABULARY, assert_near, explicit_jacobians, peft_model, rows, token_batch

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

LENGTHS, PROMPTS = (4, 6, 3), (1, 3, 2)
EXACT = {"backend_kwargs": {"stochastic": False}}
DENSE = {"factor_rank": None}


def text_batch(lengths=LENGTHS, prompts=PROMPTS, **kwargs):
    """Sequences whose tokens are scored after a prompt, labelled as collators do."""
    batch = token_batch(lengths, **kwargs)
    real = batch["attention_mask"].bool()
    answer = real & (batch["attention_mask"].cumsum(1) > torch.tensor(prompts).unsqueeze(1))
    return {**batch, "labels": batch["input_ids"].masked_fill(~answer, IGNORED)}


def loader(batch_size=2, batch=None):
    batch = batch or text_batch()
    examples = [rows(batch, n) for n in range(len(batch["labels"]))]
    return DataLoader(examples, batch_size=batch_size)


def posterior(cls=KronLoraLaplace, name="llama-lm", fit=True, dtype=torch.float64, **kwargs):
    la = cls(peft_model(name, dtype=dtype), "language_modeling", **kwargs)
    if fit:
        la.fit(loader())
    return la


def token_ggn(la, batch):
    """Sum of Jᵀ Λ J over all scored tokens, with a Jacobian for every token and logit."""
    jacobians = torch.cat([J.flatten(2) for J in explicit_jacobians(la.model, batch)], -1)
    roots = hessian_root(la.model(batch).detach(), "classification")
    J = torch.einsum("csv,svp->csp", roots, jacobians).flatten(0, 1)
    return J.T @ J


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_logits_are_those_that_transformers_scores(name):
    model = peft_model(name).eval()
    batch = text_batch(pad_to=8)
    tokens = TokenModel(model)
    labels = token_labels(batch, batch["labels"])
    logits = tokens(batch)
    assert logits.shape == ((labels != IGNORED).sum(), VOCABULARY)
    assert (labels != IGNORED).sum(1).tolist() == [3, 3, 1]
    loss = F.cross_entropy(logits, labels[labels != IGNORED])
    assert_near(loss, model(**batch).loss.to(loss))
    last = tokens.next_logits(batch)
    full = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert_near(last, full[range(3), [length - 1 for length in LENGTHS]])


def test_the_head_runs_at_scored_tokens_only():
    model = peft_model("llama-lm")
    seen = []
    head = model.get_base_model().lm_head
    handle = head.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    TokenModel(model)(text_batch())
    handle.remove()
    assert seen == [(7, 1, VOCABULARY)]
    assert not head._forward_pre_hooks


def test_labels_that_padding_would_predict_do_not_count():
    """With left padding the first real token has nothing real before it."""
    left, right = (text_batch(prompts=(0, 0, 0), pad_to=7, side=side) for side in ("left", "right"))
    counted = [token_labels(batch, batch["labels"]) for batch in (left, right)]
    assert [(labels != IGNORED).sum(1).tolist() for labels in counted] == [[3, 5, 2]] * 2
    assert (left["labels"] != IGNORED).sum(1).tolist() == [4, 6, 3]
    everything = {**right, "labels": right["input_ids"]}
    assert torch.equal(token_labels(everything, everything["labels"]), counted[1])


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_the_exact_curvature_is_the_sum_over_tokens(name):
    la = posterior(name=name, fit=False, **EXACT)
    la.model.eval()
    batch = text_batch((4, 3), (1, 2))
    y = token_labels(batch, batch["labels"])
    loss, ggn = la.backend.full(batch, y)
    expected = token_ggn(la, batch)
    assert_near(ggn, expected)
    assert_near(la.backend.diag(batch, y)[1], expected.diagonal())
    nll = F.cross_entropy(la.model(batch), y[y != IGNORED], reduction="sum")
    assert_near(loss, nll)


def test_drawn_labels_give_the_exact_curvature_on_average():
    """Also across the tokens of an example, which meet in one gradient."""
    la = posterior(fit=False, modules="v_proj", backend_kwargs={"num_samples": 1000})
    la.model.eval()
    assert la.backend.stochastic
    for name, p in la.model.named_parameters():
        p.requires_grad_("v_proj.lora" in name)
    batch = text_batch((3,), (1,))
    torch.manual_seed(0)
    _, drawn = la.backend.full(batch, token_labels(batch, batch["labels"]))
    expected = token_ggn(la, batch)
    assert (drawn - expected).norm() < 0.1 * expected.norm()


def recorded(la, example):
    """Logits of one example, and each map's inputs and output."""
    calls = {}
    hooks = [
        linear.module.register_forward_hook(
            lambda m, args, out, i=i: calls.update({i: (args[0].detach()[0], out)})
        )
        for i, linear in enumerate(la.backend.maps)
    ]
    logits = la.model(example)
    for hook in hooks:
        hook.remove()
    return logits, [calls[i] for i in range(len(calls))]


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_factors_equal_a_loop_over_examples_and_tokens(name, monkeypatch):
    """Given the labels that were drawn."""
    samples, drawn = 2, []
    draw = torch.multinomial

    def noted(p, num_samples, replacement):
        drawn.extend(draw(p, num_samples, replacement=replacement))
        return torch.stack(drawn)

    monkeypatch.setattr(torch, "multinomial", noted)
    la = posterior(name=name, fit=False, backend_kwargs={"num_samples": samples}, **DENSE)
    batch = text_batch(pad_to=7)
    la.fit(loader(3, batch))
    la.model.eval()
    expected = [[0.0, 0.0] for _ in la.backend.maps]
    for n, length in enumerate(LENGTHS):
        example = {k: v[None, :length] for k, v in rows(batch, n).items()}
        logits, calls = recorded(la, example)
        labels = torch.stack([drawn.pop(0) for _ in range(len(logits))])
        outputs = [output for _, output in calls]
        for sample in range(samples):
            loss = F.cross_entropy(logits, labels[:, sample], reduction="sum")
            grads = torch.autograd.grad(loss, outputs, retain_graph=True)
            for i, (grad,) in enumerate(grads):
                expected[i][0] += grad.T @ grad / samples
        for i, (inputs, _) in enumerate(calls):
            expected[i][1] += inputs.T @ inputs / length / len(LENGTHS)
    for block, kfac in zip(la.backend.blocks, la.H_facs.kfacs, strict=True):
        assert_near([factor.matrix for factor in kfac], expected[block.map])


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
@pytest.mark.parametrize("kind", ["exact", "empirical", "drawn"])
def test_the_fit_does_not_depend_on_batches_and_padding(cls, kind, monkeypatch):
    if kind == "drawn":  # as if chance always chose the third most likely token
        third = lambda p, samples, replacement: p.topk(3).indices[:, -1:]  # noqa: E731
        monkeypatch.setattr(torch, "multinomial", third)
    options = {"exact": EXACT, "empirical": {"backend": LoraEF}, "drawn": {}}[kind]
    evidence = []
    padded = text_batch(pad_to=8, side="left")
    for data in (loader(3), loader(1), loader(2, text_batch(pad_to=9)), loader(2, padded)):
        la = posterior(cls, fit=False, **options)
        la.fit(data)
        assert la.n_data == 3
        evidence.append(la.log_marginal_likelihood())
    for other in evidence[1:]:
        assert_near(other, evidence[0])


def test_more_draws_and_other_seeds_change_the_factors():
    factors = []
    for samples, seed in ((1, 0), (1, 1), (8, 0)):
        la = posterior(fit=False, backend_kwargs={"num_samples": samples})
        torch.manual_seed(seed)
        la.fit(loader())
        factors.append(la.H_facs.kfacs[0][0].matrix)
    for i, one in enumerate(factors):
        for other in factors[i + 1 :]:
            assert (one - other).norm() > 1e-3 * one.norm()


def test_an_example_without_scored_tokens_counts_as_one():
    """Alone in a batch or not: it says nothing, but its inputs were seen."""
    batch = text_batch()
    batch["labels"][1] = IGNORED
    ours, alone = (posterior(fit=False, backend=LoraEF) for _ in range(2))
    ours.fit(loader(3, batch))
    alone.fit(loader(1, batch))
    assert ours.n_data == alone.n_data == 3
    assert_near(alone.log_marginal_likelihood(), ours.log_marginal_likelihood())
    torch.manual_seed(0)
    posterior(fit=False).fit(loader(1, batch))  # nothing to draw for it either


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["v_proj", "lm_head"]}]
)
def test_a_trained_head_is_covered(options):
    model = peft_model("llama-lm", **options)
    la = KronLoraLaplace(model, "language_modeling", **DENSE, **EXACT)
    assert any("lm_head" in name for name in la.block_names)
    la.model.eval()
    batch = text_batch((3, 2), (1, 1))
    batch = {**batch, "labels": token_labels(batch, batch["labels"])}
    diagonal = token_ggn(la, batch).diagonal()
    assert_near(la.backend.diag(batch, batch["labels"])[1], diagonal)
    la.fit(loader(2, batch))
    assert la.log_marginal_likelihood().isfinite()


def test_collated_texts_fit_tune_and_come_back_from_a_file(tmp_path):
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    examples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)}
        for ids in ([5, 6, 7, 8], [9, 5], [6, 7, 4, 3, 2])
    ]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = DataLoader(examples, batch_size=2, collate_fn=collate)
    la = posterior(fit=False)
    torch.manual_seed(0)
    la.fit(data)
    scored = sum(len(example["input_ids"]) - 1 for example in examples)
    with torch.no_grad():
        nll = sum(-_log_likelihood(la, example["input_ids"]) for example in examples)
    assert la.loss == pytest.approx(nll.item(), rel=1e-6) and scored == 8
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(n_steps=10)
    assert la.log_marginal_likelihood() > before
    la.optimize_prior_precision(prior_structure="layerwise")
    assert la.log_marginal_likelihood() > before
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(la.model.model, tmp_path)
    assert isinstance(again.model, TokenModel) and again.likelihood == "language_modeling"
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    other = posterior(fit=False)
    other.load_state_dict(la.state_dict())
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert la.estimate_memory(next(iter(data))).jacobian < 2**20


def _log_likelihood(la, ids):
    logits = la.model.model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum()


def test_half_precision_is_summed_in_single():
    la = posterior(dtype=torch.bfloat16)
    assert la.model(text_batch()).dtype == torch.float32
    reference = posterior(dtype=torch.float32)
    assert la.loss == pytest.approx(reference.loss, rel=0.05)


@pytest.mark.parametrize("name", ["bert", "llama", "t5-lm"])
def test_only_causal_language_models_predict_tokens(name):
    with pytest.raises(ValueError, match="not a causal language model"):
        KronLoraLaplace(peft_model(name), "language_modeling")


def test_what_makes_no_sense_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="target_ids"):
        posterior(fit=False, target_ids=[3, 4])
    with pytest.raises(ValueError, match="takes the PeftModel"):
        KronLoraLaplace(LogitsModel(peft_model("llama-lm"), [3, 4]), "language_modeling")
    with pytest.raises(ValueError, match="whole vocabulary"):
        KronLoraLLLaplace(peft_model("llama-lm"), "language_modeling")
    la = posterior(enable_backprop=True)
    batch = text_batch()
    with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
        la(batch)
    for call in (la.backend.jacobians, la.gram_blocks):
        with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
            call(batch)
    with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
        la.backend.jacobians(batch, enable_backprop=True)
    with pytest.raises(ValueError, match=r"laplace_lora\.generation"):
        la.backend.selected_output_jacobians(batch, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="marglik"):
        la.optimize_prior_precision(method="gridsearch", val_loader=loader())
    with pytest.raises(ValueError, match="language_modeling posterior by marginal"):
        la.calibrate(loader())
    monkeypatch.setattr(likelihoods_module, "EXACT_VOCABULARY", 10)
    with pytest.raises(ValueError, match="49 backward passes a token"):
        posterior(**EXACT)


def test_bad_batches_are_refused_and_the_posterior_stays():
    la = posterior()
    before = la.log_marginal_likelihood()
    batch = text_batch()
    with pytest.raises(TypeError, match="collators"):
        la.fit(DataLoader([(row, row) for row in batch["input_ids"]], batch_size=2))
    for labels in (batch["labels"][:, :-1], batch["labels"].double(), batch["labels"][:, 0]):
        with pytest.raises(ValueError, match="one integer label a token"):
            la.fit(loader(2, {**batch, "labels": labels}))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.49"):
        la.fit(loader(2, {**batch, "labels": batch["labels"] + 90}))
    with pytest.raises(TypeError, match="scored is told by 'labels'"):
        la.model({"input_ids": batch["input_ids"]})
    assert torch.equal(la.log_marginal_likelihood(), before)
