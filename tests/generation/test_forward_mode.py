"""What forward mode leaves as it was, what it covers, and what it refuses."""

import threading
from types import MethodType

import pytest
import torch
from peft import CPTConfig, LoraConfig, get_peft_model

from laplace_lora import DiagLoraLaplace
from laplace_lora.generation import generate, score
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.predictive.sample_set import SampleSet
from support.architectures import TEXT, architecture
from support.batches import token_batch
from support.generation import K, seeded
from support.language import language_posterior, text_batch, text_loader
from support.models import PAD, VOCABULARY, base_model, excite
from support.opaque import Opaque
from support.sampled import fitted, read_all


def test_the_models_attention_modes_weights_and_hooks_are_left():
    la = fitted()
    model = la.logits_model.model
    model.train()
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    seen = []

    def broken(ids, scores):
        seen.append(base.config._attn_implementation)
        raise KeyError("a user's processor")

    score(la, text_batch(), K)
    with pytest.raises(KeyError):
        generate(la, token_batch((4,))["input_ids"], 3, K, logits_processor=broken)
    assert seen == ["sdpa"] and base.config._attn_implementation == "sdpa"
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def check_slopes(la, model):
    """Compare samples' logits and slopes with each text's own gradient, without padding."""
    batch = text_batch()
    logits, slopes = read_all(la, batch)
    directions = SampleSet(la.fitted, 4, seeded()).directions
    parameters = [p for p in model.parameters() if p.requires_grad]
    for n, mask in enumerate(batch["attention_mask"].bool()):
        own = model(input_ids=batch["input_ids"][n][mask][None]).logits[0]
        gradient = torch.autograd.grad(own.sum(), parameters)
        expected = directions @ torch.cat([g.flatten() for g in gradient])
        torch.testing.assert_close(logits[n][mask], own.detach())
        torch.testing.assert_close(slopes[:, n][:, mask].sum((1, 2)), expected)


@pytest.mark.parametrize("alibi", [False, True])  # eagerly it rounds these to bfloat16
def test_a_model_that_calls_torchs_attention_by_itself_is_sampled(alibi):
    own = {"alibi": alibi, "vocab_size": VOCABULARY, "pad_token_id": PAD, "hidden_size": 16}
    own |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = architecture("causal", "falcon", own, target=["query_key_value"])
    assert model.config._attn_implementation == "sdpa"
    la = fitted(model=model)
    check_slopes(la, model)
    assert model.config._attn_implementation == "sdpa"


def test_blooms_activation_is_sampled():
    """It is an `autograd.Function`, which has a derivative backwards only."""
    own = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "hidden_size": 16}
    own |= {"n_layer": 2, "n_head": 2}
    model = architecture("causal", "bloom", own, target=["query_key_value", "dense_h_to_4h"])
    la = fitted(model=model)
    check_slopes(la, model)


def test_threads_score_and_run_the_model_at_once():
    la = fitted()
    model, batch = la.logits_model.model.eval(), text_batch()
    expected = score(la, batch, K, generator=seeded()).log_probabilities
    plain = model(input_ids=batch["input_ids"]).logits
    found, outputs = [], []

    def scoring():
        found.extend(score(la, batch, K, generator=seeded()).log_probabilities for _ in range(3))

    threads = [threading.Thread(target=scoring) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        outputs.append(model(input_ids=batch["input_ids"]).logits)
    assert len(found) == 6
    for values in found:
        torch.testing.assert_close(values, expected)
    assert all(torch.equal(out, plain) for out in outputs)


class Linear8bitLt(torch.nn.Linear):
    """Named like bitsandbytes' layer."""


def test_what_has_no_forward_derivative_is_refused_by_name():
    la = fitted()
    layers = la.logits_model.model.get_base_model().model.layers
    kept = layers[0].mlp.act_fn
    layers[0].mlp.act_fn = Opaque()
    with pytest.raises(ValueError, match="without forward derivative"):
        score(la, text_batch(), K)
    layers[0].mlp.act_fn = kept
    o_proj = layers[1].self_attn.o_proj
    layers[1].self_attn.o_proj = Linear8bitLt(16, 16, bias=False).double()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj is quantised"):
        score(la, text_batch(), K)
    layers[1].self_attn.o_proj = o_proj
    with evaluation_mode(la.model):
        score(la, text_batch(), K)
    o_proj.lock = threading.Lock()  # cannot be copied
    with pytest.raises(ValueError, match="cannot be copied"):
        score(la, text_batch(), K)


def test_a_head_that_several_trainers_wrapped_is_copied_as_its_own():
    """TRL's trainers put another forward pass around the model's each time."""
    la = fitted()

    def scored():
        return score(la, text_batch(), K, generator=torch.Generator().manual_seed(0)).log_prob

    expected = scored()
    base = la.logits_model.model.get_base_model()
    for _ in range(3):
        base.forward = MethodType(wrapped_by(base.forward), base)
    assert torch.equal(scored(), expected)


def wrapped_by(original_forward):
    def _fused_forward(self, *args, **kwargs):
        return original_forward(*args, **kwargs)

    return _fused_forward


def test_adapters_on_stacked_weights_are_refused_by_name():
    own = {**TEXT, "vocab_size": VOCABULARY, "pad_token_id": PAD}
    base = architecture("causal", "mixtral", own, torch.float32, target=["q_proj"]).unload()
    config = LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"], target_modules=[])
    la = DiagLoraLaplace(get_peft_model(base, config), "language_modeling", uncovered="diag")
    la.fit(text_loader())
    with pytest.raises(ValueError, match=r"experts adapts stacked weights .* use method='exact'"):
        score(la, text_batch(), K)
    assert score(la, text_batch(), K, method="exact").log_prob.isfinite().all()


def test_a_forward_pass_that_writes_to_weights_is_refused_by_what_to_do():
    """Context-aware prompt tuning projects its weights into a ball whenever it runs."""
    kinds = {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]}
    prompts = CPTConfig(task_type="CAUSAL_LM", **kinds)
    model = excite(get_peft_model(base_model("llama-lm"), prompts))
    la = DiagLoraLaplace(model, "language_modeling", uncovered="diag")
    la.fit(text_loader())
    with pytest.raises(ValueError, match="use method='exact'"):
        score(la, text_batch(), K)
    assert score(la, text_batch(), K, method="exact").log_prob.isfinite().all()
    with pytest.warns(UserWarning, match="tuned by the marginal likelihood"):
        la.optimize_prior_precision()


def test_mixtures_of_experts():
    config = {**TEXT, "vocab_size": VOCABULARY, "pad_token_id": PAD}
    model = architecture("causal", "mixtral", config, torch.float32, ["q_proj", "v_proj"])
    la = fitted(model=model, prior_precision=20.0)
    base = model.get_base_model()
    kept = base.config._experts_implementation
    ours = score(la, text_batch(), K, n_samples=2048, generator=seeded())
    assert base.config._experts_implementation == kept == "grouped_mm"
    exact = score(la, text_batch(), K, method="exact")
    torch.testing.assert_close(ours.mean, exact.mean, atol=1e-5, rtol=1e-5)
    S = exact.covariance
    variance = S.diagonal(dim1=-2, dim2=-1)
    error = (variance[..., None] * variance[..., None, :] + S.square()) / 1024
    assert ((ours.covariance - S).abs() <= 4 * error.sqrt() + 1e-6).all()


def test_half_precision_and_gradient_checkpointing():
    la = language_posterior(dtype=torch.float32)
    model = la.logits_model.model
    reference = score(la, text_batch(), K, generator=seeded())
    model.apply(lambda module: setattr(module, "gradient_checkpointing", True))
    model.enable_input_require_grads()  # as trainers do with it
    again = score(la, text_batch(), K, generator=seeded())
    torch.testing.assert_close(again.log_probabilities, reference.log_probabilities)
    model.apply(lambda module: setattr(module, "gradient_checkpointing", False))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    coarse = score(la, text_batch(), K, generator=seeded())
    assert coarse.log_probabilities.dtype == torch.float32
    close = {"atol": 0.15, "rtol": 0.05}
    torch.testing.assert_close(coarse.log_probabilities, reference.log_probabilities, **close)
